"""The results of an evaluation, collected from its scores and written as files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import DataSettings
from ..hub.run_files import Sample, TextScores
from .options import EvaluationOptions
from .part_cache import write_whole
from .plan import Plan
from .provenance import source, without_path
from .real_text import CONTROL_SEED
from .report import results_text, scored_samples_text
from .samples import SampleSet, Subject
from .scorer import Scorer
from .scores import ScoredSet, judge_conditions


# samples of each set that samples.md shows
NUM_SHOWN = 4


def collect_results(
    plan: Plan, scorer: Scorer, options: EvaluationOptions, data: DataSettings, hardware: str
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """What `results.json` holds, from scores that are all there, and the texts of `samples.md` by titles."""
    real = scorer.score_real_text()
    controls = {name: scorer.score_control(name) for name in options.control_names}
    shown = {"Real text": real.samples[:NUM_SHOWN]}
    shown |= {f"Control: {name.replace('_', ' ')}": one.samples[:NUM_SHOWN] for name, one in controls.items()}
    sets = [(samples, *scorer.score_samples(samples)) for samples in plan.sets]
    for samples, scored, _ in sets:
        if samples.seed == 0:
            shown[f"{samples.subject.name}, {samples.steps} steps, seed 0"] = scored.samples[:NUM_SHOWN]
    results = {
        "settings": described_settings(options, data),
        "versions": scorer.parts.versions,
        "hardware": hardware,
        "judge": scorer.judge and judge_conditions(scorer.judge),
        "mauve": real.mauve,
        "reference": {
            "source": source(data.source).name,
            "num_texts": len(scorer.real.reference_texts),
            "num_held_out": scorer.real.num_held_out,
        },
        "real_text": without_none_counts(real.scores),
        "controls": {name: without_none_counts(one.scores) for name, one in controls.items()},
        "pipelines": [pipeline_results(subject, sets, plan, scorer) for subject in plan.subjects],
    }
    return results, shown


def pipeline_results(
    subject: Subject, sets: list[tuple[SampleSet, ScoredSet, dict[str, Any]]], plan: Plan, scorer: Scorer
) -> dict[str, Any]:
    """What was measured of one pipeline; `sets` are those of all, with what `score_samples` says of each."""
    entry: dict[str, Any] = {
        "name": subject.name,
        "pipeline": shown_source(subject.source),
        "sampler": subject.sampler.text,
        "sequence_length": subject.sequence_length,
        "digest": subject.digest,
        "sets": [],
    }
    for steps in dict.fromkeys(samples.steps for samples in plan.sets if samples.subject is subject):
        seeds = [
            {"seed": samples.seed} | scored.scores.to_json() | made
            for samples, scored, made in sets
            if samples.subject is subject and samples.steps == steps
        ]
        entry["sets"].append({"steps": steps, "nfe": seeds[0]["nfe"], "seeds": seeds} | over_seeds(seeds))
    for lines in plan.lines:
        if lines.subject is subject:
            entry["interpolation"] = scorer.score_lines(lines)
    return entry


def without_none_counts(scores: TextScores) -> dict[str, Any]:
    """Scores as a mapping; real text and controls come from no latents, so none of these was not finite."""
    return scores.to_json() | {"num_nonfinite_texts": scores.num_nonfinite_texts or 0}


def over_seeds(sets: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and (with n - 1) standard deviation over seeds; None where a seed has no value or, of the latter, alone."""
    mean: dict[str, float | None] = {}
    std: dict[str, float | None] = {}
    for name in sets[0]:
        if name not in ("seed", "num_texts", "batch_sizes", "nfe"):
            values = [one[name] for one in sets]
            whole = all(value is not None for value in values)
            mean[name] = statistics.fmean(values) if whole else None
            std[name] = statistics.stdev(values) if whole and len(values) > 1 else None
    return {"mean": mean, "std": std}


def described_settings(options: EvaluationOptions, data: DataSettings) -> dict[str, Any]:
    """What the results were asked for with; no folder of the machine is left in it."""
    lines = {"num_pairs": options.num_lines, "num_positions": options.num_positions}
    return {
        "num_samples": options.num_samples,
        "steps": list(options.steps),
        "samplers": list(options.samplers),
        "batch_size": options.batch_size,
        "judge_batch_size": options.judge_batch_size,
        "dtype": options.dtype,
        "seeds": list(range(options.seeds)),
        "judge": options.judge_name and source(options.judge_name).name,
        "mauve": options.with_mauve,
        "control_seed": CONTROL_SEED if options.controls else None,
        "interpolation": lines if options.interpolation else None,
        "data": {key: without_path(value) for key, value in asdict(data).items() if key != "cache_dir"},
    }


def shown_source(pipeline: str) -> str:
    """A Hub id or a folder as it was named; of a folder elsewhere on the machine only the last two parts."""
    path = Path(pipeline)
    return "/".join(path.parts[-2:]) if path.is_absolute() or pipeline.startswith(("~", "..")) else pipeline


def write_results(
    folder: Path,
    results: dict[str, Any],
    shown: dict[str, list[Sample]],
    draw: Callable[[dict[str, Any]], None],
) -> None:
    """Writes everything that is for people or other scripts, `results.json` last, and prints the table."""
    table = results_text(results)
    (folder / "results.md").write_text(table, encoding="utf-8")
    (folder / "samples.md").write_text(scored_samples_text(shown, results), encoding="utf-8")
    draw(results)
    content = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "results.json", lambda file: file.write_text(content, encoding="utf-8"))
    print(table)
