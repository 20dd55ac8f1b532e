"""What an evaluation makes: samples of each pipeline, sampler, number of steps and seed, and lines between texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .machine import device_name
from .options import EvaluationOptions
from .part_cache import FinishedParts
from .real_text import RealText
from .samplers import OWN, Sampler
from .samples import Lines, SampleSet, Subject, load_pipeline, pairs_of


@dataclass(frozen=True)
class Plan:
    """All that is to be made.

    Attributes:
        subjects: the pipelines, each with each sampler.
        sets: samples, in the order of subjects, steps and seeds.
        lines: between real texts; empty if they are not asked for.
    """

    subjects: list[Subject]
    sets: list[SampleSet]
    lines: list[Lines]

    def made_with(self, subject: Subject) -> list[SampleSet | Lines]:
        """What a pipeline makes."""
        made: list[SampleSet | Lines] = [*self.sets, *self.lines]
        return [one for one in made if one.subject is subject]


def load_subjects(options: EvaluationOptions) -> tuple[list[Subject], PreTrainedTokenizerBase]:
    """Looks at each pipeline once, so that none is found wanting when others have been sampled.

    Returns:
        Each pipeline with each sampler, and the tokenizer of all of them.

    Raises:
        OSError: one cannot be loaded.
        ValueError: they differ in tokenizer or sequence length, one has no encoders for `--interpolation`, or a
            sampler is unknown or refuses its settings or a number of steps.
    """
    subjects = []
    samplers = [Sampler.parse(text) for text in options.samplers]
    for name, path in zip(options.labels, options.pipeline, strict=True):
        pipeline = load_pipeline(path, options.dtype)
        tokenizer, own_scheduler = pipeline.tokenizer, pipeline.scheduler
        for sampler in samplers:
            pipeline.scheduler = own_scheduler
            sampler.apply(pipeline)
            for steps in options.steps:
                # fewer than the solver needs, for example
                pipeline.scheduler.set_timesteps(steps)
            full_name = name if list(options.samplers) == [OWN] else f"{name}, {sampler.text}"
            subjects.append(Subject.of(pipeline, full_name, path, options.dtype, sampler))
    for subject in subjects:
        check_subject(subject, subjects[0], options.interpolation)
    return subjects, tokenizer


def check_subject(subject: Subject, first: Subject, needs_encoders: bool) -> None:
    """Raises ValueError for a pipeline without encoders that are needed, or of other texts than the first one."""
    if needs_encoders and subject.missing_encoders:
        raise ValueError(
            f"--interpolation encodes real texts, but the pipeline {subject.name!r} lacks "
            f"{' and '.join(subject.missing_encoders)}: save it with its encoders, or leave --interpolation out."
        )
    if (subject.vocabulary, subject.sequence_length) != (first.vocabulary, first.sequence_length):
        raise ValueError(
            f"The pipelines {first.name!r} ({first.sequence_length} tokens) and {subject.name!r} "
            f"({subject.sequence_length} tokens) differ in tokenizer or sequence length, so no real text is that "
            "of both: evaluate them one by one, each into a folder of its own."
        )


def make_plan(
    subjects: list[Subject], real: RealText, options: EvaluationOptions, parts: FinishedParts, device: str
) -> Plan:
    """What is asked for; `device` is the kind that all sampling times are of."""
    sets = [
        SampleSet.of(parts, subject, steps, seed, options.num_samples, device)
        for subject in subjects
        for steps in options.steps
        for seed in range(options.seeds)
    ]
    lines = []
    if options.interpolation:
        ends = pairs_of(real.sequences, options.num_lines)
        # decoding knows no sampler: the first subject of each pipeline
        of_pipelines = {subject.source: subject for subject in reversed(subjects)}
        lines = [Lines.of(parts, subject, ends, options.num_positions) for subject in of_pipelines.values()]
    return Plan(subjects, sets, lines)


def common_device(accelerator: Accelerator) -> str:
    """The kind of device that all processes run on, and the threads of each on a CPU.

    Raises:
        ValueError: there are several kinds.
    """
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
    for subject in plan.subjects:
        batches = [batch for made in plan.made_with(subject) for batch in made.missing_batches(options.batch_size)]
        # all processes have seen what is missing before one of them makes it; the longest pieces first
        batches.sort(key=lambda batch: batch.cost, reverse=True)
        accelerator.wait_for_everyone()
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        if mine:
            pipeline = subject.load().to(accelerator.device)
            # what a device does only once shall not count as sampling time
            pipeline(batch_size=1, num_inference_steps=min(options.steps), output_type="seq")
            total = sum(batch.cost for batch in mine)
            progress = tqdm(total=total, desc=f"Sampling {subject.name}", disable=not accelerator.is_main_process)
            with progress:
                for batch in mine:
                    batch.make(pipeline, batch.indices, options.batch_size)
                    progress.update(batch.cost)
        accelerator.wait_for_everyone()
