"""The Hub card of a run, written from a template and from what the run has left in its folder.

    python -m ldlm_hf.hub.model_card RUN [--output FOLDER] [--license ID] [--language CODE] [--model_id OWNER/NAME]

reads `settings.yaml`, `metrics.jsonl` and `results.json` of the folder RUN and writes `README.md`, with its pictures
beside it, into the pipeline's folder `RUN/pipeline`, an adapter's `RUN/lora`, or another. Every number of a card comes
from these files. What was not measured is left out, and the card says so.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..metrics.registry import SCORES, Score
from .run_files import Run, Sample, TextScores, read_run


TEMPLATE = Path(__file__).parent / "model_card_template.md"
# texts of a set from which on a card gives its MAUVE: of fewer, their number decides more than the model
MIN_MAUVE_TEXTS = 500
# samples that a card shows
NUM_SAMPLES = 8
# columns of a line of a sample
LINE_WIDTH = 110


# score → its title and its type on the Hub, where they are not its title elsewhere and its name
TITLES = {"diversity": "n-gram diversity", "generative_perplexity": "generative perplexity"}
HUB_TYPES = {"generative_perplexity": "perplexity"}
# the scores that a card shows, under its titles and in its order
METRICS = {
    name: replace(score, title=TITLES.get(name, score.title)) for name, score in SCORES.items() if score.is_main
}


def write_card(run: Run, folder: str | Path) -> ModelCard:
    """Writes a card as `README.md`, and its pictures beside it.

    Args:
        run: what it tells of.
        folder: the pipeline's folder, which `push_to_hub` uploads whole; made if it is not there.

    Raises:
        ValueError: `model_id` is no id of the Hub.
        ImportError: there is a log to draw, and no matplotlib.
    """
    folder = Path(folder)
    samples, real = (published(scores) for scores in (run.results.sample_scores, run.results.real_scores))
    run = replace(run, results=replace(run.results, sample_scores=samples, real_scores=real))
    if run.results.model_id is not None:
        validate_repo_id(run.results.model_id)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if run.log:
        from .training_curves import plot_training_curves

        pictures = plot_training_curves(run.log, folder)
    sets = {"samples": samples, "held-out real texts": real}
    measured = measured_metrics(samples, real)
    # the template says why a MAUVE that was measured is not shown
    explained = {"mauve"} if run.results.mauve else set()
    card = ModelCard.from_template(
        card_data(run),
        template_path=str(TEMPLATE),
        run=run,
        model_id=run.results.model_id or "path/to/this/folder",
        sets={title: scores for title, scores in sets.items() if scores is not None},
        measured=measured,
        not_measured=[metric.title for name, metric in METRICS.items() if name not in {*measured, *explained}],
        min_mauve_texts=MIN_MAUVE_TEXTS,
        highest_entropy=math.log(run.results.sequence_length),
        progress=progress(run),
        changed_settings=yaml.safe_dump(run.results.changed_settings, allow_unicode=True).strip(),
        pictures=pictures,
        samples=run.results.samples[:NUM_SAMPLES],
        duration=duration,
        sample_scores=sample_scores,
        fenced=fenced,
        marked=marked,
        num_samples=NUM_SAMPLES,
    )
    card.save(folder / "README.md")
    return card


def published(scores: TextScores | None) -> TextScores | None:
    """What a card says of a set's scores: without the MAUVE of too few texts."""
    if scores is None or scores.num_texts >= MIN_MAUVE_TEXTS:
        return scores
    return replace(scores, values=scores.values | {"mauve": None})


def card_data(run: Run) -> ModelCardData:
    """The metadata: only what is known, and of models and data sets only those that the Hub has."""
    results = run.results
    base_models = [
        source.name for source in (results.token_encoder, results.components) if source and source.is_hub_id
    ]
    measured = eval_results(run)
    return ModelCardData(
        language=results.language,
        license=results.license,
        library_name="diffusers",
        pipeline_tag="text-generation",
        tags=[*(["ldlm", "text-diffusion"] if run.is_latent_diffusion else []), *(["lora"] if run.adapter else [])]
        or None,
        base_model=base_models or None,
        datasets=[results.corpus.name] if results.corpus.is_hub_id else None,
        model_name=run.name if measured else None,
        eval_results=measured or None,
    )


def eval_results(run: Run) -> list[EvalResult]:
    """The samples' scores for the `model-index`; their names say what they depend on."""
    results, data = run.results, run.settings["data"]
    if results.sample_scores is None:
        return []
    conditions = (
        f"{results.sample_scores.num_texts} texts of {results.sequence_length} tokens, "
        f"{run.settings['evaluation']['num_inference_steps']} steps, seed {run.settings['loop']['seed']}"
    )
    found = []
    for name, metric in METRICS.items():
        value = results.sample_scores.values.get(name)
        if value is None:
            continue
        judge = f", judge {results.judge['name']}" if metric.needs_judge and results.judge else ""
        found.append(
            EvalResult(
                task_type="text-generation",
                # the Hub asks for a data set's id; a local corpus has none
                dataset_type=results.corpus.name if results.corpus.is_hub_id else "local",
                dataset_name=results.corpus.name,
                dataset_config=data["config_name"],
                dataset_revision=data["revision"],
                metric_type=HUB_TYPES.get(name, name),
                metric_name=f"{metric.title}{judge}, {conditions}",
                metric_value=round(value, metric.digits + 1),
            )
        )
    return found


def measured_metrics(*sets: TextScores | None) -> dict[str, Score]:
    """The metrics that any of the sets has."""
    measured = {name for scores in sets if scores for name, value in scores.values.items() if value is not None}
    return {name: metric for name, metric in METRICS.items() if name in measured}


def progress(run: Run) -> dict[str, int]:
    """Steps and tokens of a run by its log, or as planned, and how many of the steps were skipped."""
    loop = run.settings["loop"]
    last = max((record for record in run.log if "tokens" in record), key=lambda record: record["step"], default={})
    steps = last.get("step", loop["max_steps"])
    tokens = steps * loop["batch_size"] * run.results.sequence_length
    return {"steps": steps, "tokens": last.get("tokens", tokens), "skipped": last.get("skipped_steps", 0)}


def duration(seconds: float) -> str:
    """5400 → '1.5 hours'"""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def sample_scores(sample: Sample) -> str:
    """A sample's own scores."""
    perplexity = "not measured" if sample.perplexity is None else f"{sample.perplexity:,.1f}"
    entropy = "not measured" if sample.entropy is None else f"{sample.entropy:.2f} nats"
    return f"Gen. PPL {perplexity}, entropy {entropy}"


def fenced(text: str) -> str:
    """A text as a Markdown code block, long lines wrapped, whatever Markdown or HTML it holds itself."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, LINE_WIDTH) or [""]]
    return "\n".join([f"{fence}text", *lines, fence])


def marked(samples: Sequence[Sequence[str]]) -> str:
    """Texts in the pieces before, within and behind the place that was written, which « and » enclose."""
    return "\n\n".join(f"{before} «{written}» {after}".strip() for before, written, after in samples)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ldlm_hf.hub.model_card",
        description="Writes the card of a run again, from the run's own files.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="folder of the card; by default the run's pipeline")
    parser.add_argument("--name", help="the model's name; by default that of the run's folder")
    parser.add_argument("--license", help="identifier of the model's licence on the Hub")
    parser.add_argument("--language", help="code of the language that the model writes")
    parser.add_argument("--model_id", help="the model's id on the Hub")
    options = parser.parse_args(arguments)
    run = read_run(options.run)
    stated = {name: getattr(options, name) for name in ("license", "language", "model_id")}
    results = replace(run.results, **{name: value for name, value in stated.items() if value is not None})
    folder = options.output or options.run / run.result_folder
    write_card(replace(run, name=options.name or run.name, results=results), folder)
    print(folder / "README.md")


if __name__ == "__main__":
    main()
