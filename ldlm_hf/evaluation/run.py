"""The evaluation of pipelines that `evaluate.py` starts (Section 6, App. D, E and I).

It writes to its output folder

* `results.json`: every score of every seed, mean and standard deviation over seeds, settings, versions, hardware;
* `results.md`: the table, with real text and its controls in rows of their own;
* `samples.md`: the first texts of each set, each with its own Gen. PPL and entropy;
* `pareto.png`: Gen. PPL against entropy; `evaluations.png`: every score over the evaluations of the denoiser (NFE);
  `interpolation.png`: Gen. PPL between two real texts;
* `parts/`: what is finished. A killed evaluation goes on from there when the same command is given again; parts that
  were made under other settings are not found, and made anew. All processes must see the folder; it may be deleted
  afterwards.

`results.json` is written last. One evaluation at a time works in a folder; a second one is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import DataSettings
from ..hub.model_card import Sample, TextScores
from ..metrics import Judge, LatentSmoothness, TokenEntropy, load_judge, text_features
from .folder_lock import lock_folder
from .machine import device_name, hardware, keep_freed_memory, versions
from .part_cache import FinishedParts, digest, module_digest, remove_unfinished, write_whole
from .provenance import source, without_path
from .real_text import (
    CONTROL_SEED,
    CONTROLS,
    RealText,
    check_mauve_size,
    control_set,
    load_real_text,
)
from .report import results_text, samples_text
from .samplers import OWN, Sampler
from .samples import Lines, SampleSet, Subject, load_pipeline, missing_batches, pairs_of
from .scores import References, ScoredSet, judge_conditions, score_set


DTYPES = ("float32", "bfloat16", "float16")
# samples of each set that samples.md shows
NUM_SHOWN = 4


def evaluate_pipelines(options: argparse.Namespace, data: DataSettings) -> dict[str, Any] | None:
    """Samples and scores pipelines, and writes the results, which the main process returns."""
    check_options(options)
    # processes wait for the one with the most work
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if not accelerator.is_main_process:
        evaluate.disable_progress_bar()
    # what would stop the evaluation later comes first: judge, pipelines, text
    judge = None if options.judge == "none" else load_judge(options.judge, device=accelerator.device)
    subjects, tokenizer = load_subjects(options)
    with accelerator.main_process_first():
        real = load_real_text(
            data,
            tokenizer,
            subjects[0].sequence_length,
            options.num_samples,
            with_references=judge is not None and not options.no_mauve,
            rank=accelerator.process_index,
        )
    parts = FinishedParts(options.output_dir / "parts", evaluation_versions())
    results = None
    with lock_parts(parts) if accelerator.is_main_process else contextlib.nullcontext():
        sets, lines = plan(subjects, options, real, parts, accelerator)
        for subject in subjects:
            make_missing(subject, [made for made in [*sets, *lines] if made.subject is subject], options, accelerator)
        scorer = build_scorer(real, judge, tokenizer, options, parts, accelerator)
        score_missing(scorer, real, sets, lines, options, accelerator)
        if accelerator.is_main_process:
            results = write_results(scorer, real, subjects, sets, lines, options, data, accelerator.device)
    accelerator.end_training()
    return results


def lock_parts(parts: FinishedParts) -> TextIO:
    """Takes the folder for this evaluation, and clears it of what one that was killed has left half-written.

    The main process does it; the others write nothing before they have waited for it.
    """
    lock = lock_folder(parts.folder, "wait for that evaluation, or name another --output_dir.")
    remove_unfinished(parts.folder.parent, parts.folder, *parts.folder.iterdir())
    return lock


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what no evaluation can work with."""
    if options.judge != "none" and not options.no_mauve:
        check_mauve_size(options.num_samples)
    if options.names is not None and len(options.names) != len(options.pipeline):
        raise ValueError(f"--names gives {len(options.names)} names to {len(options.pipeline)} pipelines: name each.")
    names = options.names or [default_name(pipeline) for pipeline in options.pipeline]
    if len(set(names)) < len(names):
        raise ValueError(f"The pipelines' names {names} are not all different: tell them apart with --names.")
    options.names = names
    if len(set(options.steps)) < len(options.steps):
        raise ValueError(f"--steps {options.steps} has a number twice: leave one out.")
    if options.interpolation:
        options.num_pairs = options.num_pairs or options.num_samples // 2
        if not 1 <= options.num_pairs <= options.num_samples // 2:
            raise ValueError(
                f"--num_pairs {options.num_pairs}: --num_samples {options.num_samples} real texts make at most "
                f"{options.num_samples // 2} pairs. Ask for fewer pairs or more samples."
            )
        if options.num_positions < 3:
            raise ValueError(f"--num_positions {options.num_positions}: a line needs its ends and a point between.")
    elif options.num_pairs is not None:
        raise ValueError(f"--num_pairs {options.num_pairs} is of the lines that --interpolation decodes: add that.")


def default_name(pipeline: str) -> str:
    """RUN/pipeline → RUN's name; other folders and Hub ids by their own."""
    path = Path(pipeline)
    if not path.exists():
        return pipeline
    return path.resolve().parent.name if path.name == "pipeline" else path.resolve().name


def evaluation_versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    return versions() | {name: version(name) for name in ("evaluate", "mauve-text")}


def load_subjects(options: argparse.Namespace) -> tuple[list[Subject], PreTrainedTokenizerBase]:
    """Looks at each pipeline once, so that none is found wanting when others have been sampled.

    Raises:
        OSError: one cannot be loaded.
        ValueError: they differ in tokenizer or sequence length, one has no encoders for `--interpolation`, or a
            sampler is unknown or refuses its settings or a number of steps.
    """
    subjects = []
    samplers = [Sampler.parse(text) for text in options.samplers]
    for name, path in zip(options.names, options.pipeline, strict=True):
        pipeline = load_pipeline(path, options.dtype)
        tokenizer, own_scheduler = pipeline.tokenizer, pipeline.scheduler
        for sampler in samplers:
            pipeline.scheduler = own_scheduler
            sampler.apply(pipeline)
            for steps in options.steps:
                # fewer than the solver needs, for example
                pipeline.scheduler.set_timesteps(steps)
            full_name = name if options.samplers == [OWN] else f"{name}, {sampler.text}"
            subjects.append(Subject.of(pipeline, full_name, path, options.dtype, sampler))
    for subject in subjects:
        if options.interpolation and subject.missing_encoders:
            raise ValueError(
                f"--interpolation encodes real texts, but the pipeline {subject.name!r} lacks "
                f"{' and '.join(subject.missing_encoders)}: save it with its encoders, or leave --interpolation out."
            )
        if (subject.vocabulary, subject.sequence_length) != (subjects[0].vocabulary, subjects[0].sequence_length):
            raise ValueError(
                f"The pipelines {subjects[0].name!r} ({subjects[0].sequence_length} tokens) and {subject.name!r} "
                f"({subject.sequence_length} tokens) differ in tokenizer or sequence length, so no real text is that "
                "of both: evaluate them one by one, each into a folder of its own."
            )
    return subjects, tokenizer


def plan(
    subjects: list[Subject],
    options: argparse.Namespace,
    real: RealText,
    parts: FinishedParts,
    accelerator: Accelerator,
) -> tuple[list[SampleSet], list[Lines]]:
    """All that is to be made.

    Raises:
        ValueError: the processes run on devices of several kinds.
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
    sets = [
        SampleSet.of(parts, subject, steps, seed, device)
        for subject in subjects
        for steps in options.steps
        for seed in range(options.seeds)
    ]
    lines = []
    if options.interpolation:
        ends = pairs_of(real.sequences, options.num_pairs)
        # decoding knows no sampler
        of_pipelines = {subject.source: subject for subject in reversed(subjects)}
        lines = [Lines.of(parts, subject, ends, options.num_positions) for subject in of_pipelines.values()]
    return sets, lines


def make_missing(
    subject: Subject, made: list[SampleSet | Lines], options: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Samples and decodes what is still missing of a pipeline, shared out by process."""
    batches = [
        batch
        for one in made
        for batch in missing_batches(
            one, options.num_samples if isinstance(one, SampleSet) else len(one.ends), options.batch_size
        )
    ]
    # all processes have seen what is missing before one of them makes it; the longest pieces first
    batches.sort(key=lambda batch: batch.cost, reverse=True)
    accelerator.wait_for_everyone()
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipeline = subject.load().to(accelerator.device)
        # what a device does only once shall not count as sampling time
        pipeline(batch_size=1, num_inference_steps=min(options.steps), output_type="seq")
        total = sum(batch.cost for batch in mine)
        with tqdm(total=total, desc=f"Sampling {subject.name}", disable=not accelerator.is_main_process) as progress:
            for batch in mine:
                batch.make(pipeline, batch.indices, options.batch_size)
                progress.update(batch.cost)
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Scorer:
    """What all sets are scored with; a set that has been scored is not scored again."""

    judge: Judge | None
    judge_digest: str | None
    batch_size: int
    references: References | None
    tokenizer: PreTrainedTokenizerBase
    parts: FinishedParts

    def texts(self, sequences: torch.Tensor) -> list[str]:
        """Token ids (n, L) → texts."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)

    def score(self, sequences: Sequence[Sequence[int]], texts: list[str]) -> ScoredSet:
        """Scores of a set of token ids and their texts."""
        values = self.parts.value(
            "scores",
            lambda: asdict(score_set(sequences, texts, self.judge, self.batch_size, self.references)),
            sequences=digest(sequences),
            texts=digest(texts),
            judge=self.judge_digest,
            references=self.references and digest(self.references.texts),
        )
        samples = [Sample(**sample) for sample in values["samples"]]
        return ScoredSet(TextScores(**values["scores"]), samples, values["judge"], values["mauve"])

    def score_samples(self, samples: SampleSet, count: int) -> tuple[ScoredSet, dict[str, Any]]:
        """Scores of a set of samples, and how long it took to make, in which batches."""
        rows = samples.rows.load(count)
        scored = self.score(rows["sequences"].tolist(), self.texts(rows["sequences"]))
        scores = replace(scored.scores, num_nonfinite_texts=int((~rows["is_finite"]).sum()))
        made = {"seconds": float(rows["seconds"].sum()), "batch_sizes": sorted(set(rows["batch_size"].tolist()))}
        return replace(scored, scores=scores), made | {"nfe": int(rows["nfe"][0])}

    def score_lines(self, lines: Lines) -> dict[str, Any]:
        """Generative perplexity and entropy over the position on the lines."""
        sequences = lines.rows.load(len(lines.ends))["sequences"]  # (pairs, K, L)
        positions = lines.positions.tolist()
        flat = sequences.flatten(0, 1)

        def measure() -> dict[str, Any]:
            entropies = [TokenEntropy(keep_in_memory=True).compute(predictions=some) for some in sequences.unbind(1)]
            result = {"positions": positions, "generative_perplexity": None, "roughness": None}
            if self.judge is not None:
                smoothness = LatentSmoothness(keep_in_memory=True).compute(
                    predictions=self.texts(flat),
                    positions=positions * len(sequences),
                    judge=self.judge,
                    batch_size=self.batch_size,
                )
                result["generative_perplexity"] = smoothness["perplexities"]
                result |= {name: smoothness[name] for name in ("roughness", "num_unscored_texts")}
            entropy = [one["entropy"] for one in entropies]
            return result | {"entropy": entropy, "num_pairs": len(sequences)}

        return self.parts.value(
            "smoothness", measure, sequences=digest(sequences.tolist()), positions=positions, judge=self.judge_digest
        )


def build_scorer(
    real: RealText,
    judge: Judge | None,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    parts: FinishedParts,
    accelerator: Accelerator,
) -> Scorer:
    """The scorer. One process makes the references' features, once for each judge and set of references."""
    judge_digest = None
    references = None
    if judge is not None:
        judge_digest = digest([module_digest(judge.model), judge.tokenizer.get_vocab()])
    if judge is not None and real.reference_texts:
        shared = FinishedParts(options.cache_dir or parts.folder, parts.versions)
        rows = shared.rows("features", texts=digest(real.reference_texts), judge=judge_digest)
        count = len(real.reference_texts)
        if accelerator.is_main_process and rows.missing(count):
            # evaluations that share the folder wait for the one that makes them
            with lock_folder(rows.folder):
                remove_unfinished(rows.folder)
                if rows.missing(count):
                    features = text_features(real.reference_texts, judge, options.judge_batch_size)
                    rows.save(list(range(count)), {"features": torch.from_numpy(features)})
        accelerator.wait_for_everyone()
        references = References(real.reference_texts, rows.load(count)["features"].numpy())
    return Scorer(judge, judge_digest, options.judge_batch_size, references, tokenizer, parts)


def score_missing(
    scorer: Scorer,
    real: RealText,
    sets: list[SampleSet],
    lines: list[Lines],
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Scores all sets, shared out by process; what is scored already is only read."""
    work = [lambda: scorer.score(real.sequences.tolist(), real.texts)]
    work += [lambda name=name: scorer.score(*control_set(name, real, scorer.tokenizer)) for name in controls(options)]
    work += [lambda samples=samples: scorer.score_samples(samples, options.num_samples) for samples in sets]
    work += [lambda some=some: scorer.score_lines(some) for some in lines]
    mine = work[accelerator.process_index :: accelerator.num_processes]
    for score in tqdm(mine, desc="Sets scored", disable=not accelerator.is_main_process):
        score()
    accelerator.wait_for_everyone()


def controls(options: argparse.Namespace) -> list[str]:
    """Names of the controls that are asked for."""
    return list(CONTROLS) if options.controls else []


def write_results(
    scorer: Scorer,
    real: RealText,
    subjects: list[Subject],
    sets: list[SampleSet],
    lines: list[Lines],
    options: argparse.Namespace,
    data: DataSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Writes everything that is for people or other scripts, from scores that are all there."""
    scored_real = scorer.score(real.sequences.tolist(), real.texts)
    shown = {"Real text": scored_real.samples[:NUM_SHOWN]}
    results: dict[str, Any] = {
        "settings": described_settings(options, data),
        "versions": scorer.parts.versions,
        "hardware": hardware(device),
        "judge": scorer.judge and judge_conditions(scorer.judge),
        "mauve": scored_real.mauve,
        "reference": {
            "source": source(data.source).name,
            "num_texts": len(real.reference_texts),
            "num_held_out": real.num_held_out,
        },
        "real_text": without_none_counts(scored_real.scores),
        "controls": {},
        "pipelines": [],
    }
    for name in controls(options):
        scored = scorer.score(*control_set(name, real, scorer.tokenizer))
        results["controls"][name] = without_none_counts(scored.scores)
        shown[f"Control: {name.replace('_', ' ')}"] = scored.samples[:NUM_SHOWN]
    for subject in subjects:
        entry: dict[str, Any] = {
            "name": subject.name,
            "pipeline": shown_source(subject.source),
            "sampler": subject.sampler.text,
            "sequence_length": subject.sequence_length,
            "digest": subject.digest,
            "sets": [],
        }
        for steps in options.steps:
            of_seeds = []
            for samples in (one for one in sets if one.subject is subject and one.steps == steps):
                scored, timing = scorer.score_samples(samples, options.num_samples)
                of_seeds.append({"seed": samples.seed} | without_none_counts(scored.scores) | timing)
                if samples.seed == 0:
                    shown[f"{subject.name}, {steps} steps, seed 0"] = scored.samples[:NUM_SHOWN]
            nfe = of_seeds[0]["nfe"]
            entry["sets"].append({"steps": steps, "nfe": nfe, "seeds": of_seeds} | over_seeds(of_seeds))
        for some in lines:
            if some.subject is subject:
                entry["interpolation"] = scorer.score_lines(some)
        results["pipelines"].append(entry)
    folder = options.output_dir
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / "results.md").write_text(results_text(results), encoding="utf-8")
    (folder / "samples.md").write_text(samples_text(shown, results), encoding="utf-8")
    write_whole(folder / "results.json", lambda file: file.write_text(text, encoding="utf-8"))
    print((folder / "results.md").read_text(encoding="utf-8"))
    return results


def described_settings(options: argparse.Namespace, data: DataSettings) -> dict[str, Any]:
    """What the results were asked for with; no folder of the machine is left in it."""
    kept = ("num_samples", "steps", "samplers", "batch_size", "judge_batch_size", "dtype")
    settings = {name: getattr(options, name) for name in kept}
    texts = {key: without_path(value) for key, value in asdict(data).items() if key != "cache_dir"}
    return settings | {
        "seeds": list(range(options.seeds)),
        "judge": None if options.judge == "none" else source(options.judge).name,
        "mauve": options.judge != "none" and not options.no_mauve,
        "control_seed": CONTROL_SEED if options.controls else None,
        "interpolation": {key: getattr(options, key) for key in ("num_pairs", "num_positions")}
        if options.interpolation
        else None,
        "data": texts,
    }


def shown_source(pipeline: str) -> str:
    """A Hub id or a folder as it was named; of a folder elsewhere on the machine only the last two parts."""
    path = Path(pipeline)
    return "/".join(path.parts[-2:]) if path.is_absolute() or pipeline.startswith(("~", "..")) else pipeline


def without_none_counts(scores: TextScores) -> dict[str, Any]:
    """Scores as a mapping; real text and controls come from no latents, so none of these was not finite."""
    return asdict(scores) | {"num_nonfinite_texts": scores.num_nonfinite_texts or 0}


def over_seeds(sets: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and (with n - 1) standard deviation over seeds; None where a seed has no value or, of the latter, alone."""
    mean: dict[str, float | None] = {}
    std: dict[str, float | None] = {}
    for name in sets[0]:
        if name in ("seed", "num_texts", "batch_sizes", "nfe"):
            continue
        values = [one[name] for one in sets]
        whole = all(value is not None for value in values)
        mean[name] = statistics.fmean(values) if whole else None
        std[name] = statistics.stdev(values) if whole and len(values) > 1 else None
    return {"mean": mean, "std": std}
