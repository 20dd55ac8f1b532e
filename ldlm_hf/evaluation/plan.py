"""What an evaluation makes: samples of each pipeline, sampler, number of steps and seed, and lines between texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from operator import attrgetter, itemgetter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .machine import device_name
from .options import EvaluationOptions
from .part_cache import FinishedParts, digest
from .real_text import RealText
from .samplers import OWN, Sampler
from .samples import Lines, SampleSet, Subject, load_pipeline, pairs_of


@dataclass(frozen=True)
class Plan:
    """The pipelines, each with each sampler; their samples; and lines between real texts, if they are asked for."""

    subjects: list[Subject]
    sets: list[SampleSet]
    lines: list[Lines]


def load_subjects(options: EvaluationOptions) -> tuple[list[Subject], PreTrainedTokenizerBase]:
    """Each pipeline with each sampler, and the tokenizer of all of them.

    Each pipeline is looked at once, so that none is found wanting when others have been sampled.
    """
    subjects = []
    samplers = [Sampler.parse(text) for text in options.samplers]
    for name, path in zip(options.labels, options.pipeline, strict=True):
        pipeline = load_pipeline(path, options.dtype)
        tokenizer, own_scheduler = pipeline.tokenizer, pipeline.components.get("scheduler")
        for sampler in samplers:
            if own_scheduler is not None:
                pipeline.scheduler = own_scheduler
            sampler.apply(pipeline)
            for steps in options.steps if own_scheduler is not None else ():
                # fewer than the solver needs, for example
                pipeline.scheduler.set_timesteps(steps)
            full_name = name if list(options.samplers) == [OWN] else f"{name}, {sampler.text}"
            subjects.append(Subject.of(pipeline, full_name, path, options.dtype, sampler))
    first = subjects[0]
    for subject in subjects:
        if options.interpolation and subject.missing_encoders:
            raise ValueError(
                f"--interpolation encodes real texts, but the pipeline {subject.name!r} lacks "
                f"{' and '.join(subject.missing_encoders)}: save it with its encoders, or leave --interpolation out."
            )
        if options.task == "unconditional" and subject.source_length is not None:
            raise ValueError(
                f"The pipeline {subject.name!r} writes targets for sources (source_length={subject.source_length}), "
                "and nothing without: evaluate it with --task continuation."
            )
        if subject.text_layout != first.text_layout:
            raise ValueError(
                f"The pipelines {first.name!r} ({first.sequence_length} tokens) and {subject.name!r} "
                f"({subject.sequence_length} tokens) differ in tokenizer, sequence or source length, so no real text "
                "is that of both: evaluate them one by one, each into a folder of its own."
            )
    return subjects, tokenizer


def make_plan(
    subjects: list[Subject], real: RealText, options: EvaluationOptions, parts: FinishedParts, device: str
) -> Plan:
    """What is asked for; `device` is the kind that all sampling times are of."""
    sets = []
    for subject in subjects:
        for steps, seed in itertools.product(subject.steps(options.steps), range(options.seeds)):
            depends_on = {"pipeline": subject.digest, "dtype": subject.dtype, "steps": steps, "seed": seed}
            rows = parts.rows("samples", **depends_on, device=device)
            sets.append(SampleSet(subject, steps, seed, options.num_samples, rows))
    lines = []
    if options.interpolation:
        ends = pairs_of(real.sequences, options.num_lines)
        positions = torch.linspace(0, 1, options.num_positions)
        # decoding knows no sampler: the first subject of each pipeline
        for subject in {subject.source: subject for subject in reversed(subjects)}.values():
            depends_on = {"ends": digest(ends.tolist()), "positions": options.num_positions}
            rows = parts.rows("lines", pipeline=subject.digest, dtype=subject.dtype, **depends_on)
            lines.append(Lines(subject, ends, positions, rows))
    return Plan(subjects, sets, lines)


def common_device(accelerator: Accelerator) -> str:
    """The kind of device that all processes run on, and the threads of each on a CPU; ValueError for several kinds."""
    device = device_name(accelerator.device)
    if accelerator.device.type == "cpu":
        device += f", {torch.get_num_threads()} threads"
    kinds = sorted(set(gather_object([device])))
    if len(kinds) > 1:
        raise ValueError(
            f"The processes run on devices of several kinds ({'; '.join(kinds)}), and the sampling time of a set is "
            "that of one: launch them on one kind, with as many threads each."
        )
    return device


def make_missing(plan: Plan, options: EvaluationOptions, accelerator: Accelerator) -> None:
    """Samples and decodes what is not there yet, shared out by process."""
    all_made: list[SampleSet | Lines] = [*plan.sets, *plan.lines]
    for subject in plan.subjects:
        pieces = [
            (made.row_cost * len(indices), made, indices)
            for made in all_made
            if made.subject is subject
            for indices in made.missing_batches(options.batch_size)
        ]
        # all processes have seen what is missing before one of them makes it; the longest pieces first
        pieces.sort(key=itemgetter(0), reverse=True)
        accelerator.wait_for_everyone()
        mine = pieces[accelerator.process_index :: accelerator.num_processes]
        if mine:
            pipeline = subject.load().to(accelerator.device)
            sets = [made for _, made, _ in mine if isinstance(made, SampleSet)]
            if sets:
                # what a device does only once shall not count as sampling time
                min(sets, key=attrgetter("row_cost")).sample(pipeline, [0])
            total = sum(cost for cost, _, _ in mine)
            with tqdm(
                total=total, desc=f"Sampling {subject.name}", disable=not accelerator.is_main_process
            ) as progress:
                for cost, made, indices in mine:
                    made.make(pipeline, indices, options.batch_size)
                    progress.update(cost)
        accelerator.wait_for_everyone()
