"""The end of a run: samples and their scores beside real text, for people (`samples.md`) and for the Hub card."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

from ..evaluation.conditional import Task, write_and_score
from ..evaluation.machine import hardware, versions
from ..evaluation.provenance import source, without_path
from ..evaluation.quality_ladder import quality_ladder
from ..evaluation.real_text import held_out_rows
from ..evaluation.samplers import Sampler
from ..evaluation.samples import conditioning, missing_encoders, sample, sources_of
from ..evaluation.scores import beside_real_text, judge_conditions, real_part
from ..hub import training_curves  # noqa: F401  a missing matplotlib stops a run before training, not after it
from ..hub.model_card import write_card
from ..hub.run_files import RunResults, read_run
from ..loading.settings_reader import differences, flatten, to_yaml
from ..metrics import load_judge
from .components import count_parameters
from .journal import samples_text
from .settings import MACHINE_SETTINGS, TrainingSettings


def finish_run(
    pipeline: DiffusionPipeline,
    validation: Dataset[dict[str, torch.Tensor]],
    settings: TrainingSettings,
    results: dict[str, float],
    seconds: float,
    license: str | None = None,
    language: str | None = None,
    model_id: str | None = None,
) -> None:
    """Gives a trained pipeline, saved already, its sampler, samples it, scores it beside real text, and writes
    `samples.md`, `results.json` and the card.

    MAUVE is measured if there are twice as many held-out sequences as samples. ValueError where `evaluation.sampler`
    has a learned time grid and the run has not seen every time yet.
    """
    components = {name: module for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    run_results = replace(
        describe(settings, len(validation[0]["input_ids"])),
        pipeline=type(pipeline).__name__,
        license=license,
        language=language,
        model_id=model_id,
        parameters={name: count_parameters(module) for name, module in components.items()},
        hardware=hardware(pipeline.device),
        versions=versions(),
        seconds=seconds,
        held_out={name: value for name, value in results.items() if "/" not in name},
        num_held_out=min(settings.evaluation.num_sequences, len(validation)),  # type: ignore[arg-type]
    )
    score_run(pipeline, validation, settings, run_results)


def score_run(
    pipeline: DiffusionPipeline,
    validation: Dataset[dict[str, torch.Tensor]],
    settings: TrainingSettings,
    run_results: RunResults,
) -> None:
    """The part of `finish_run` that `settings.evaluation` is about: sampler, samples, scores, and the files that tell
    of them. What else the card says is in `run_results`."""
    evaluation, output_dir = settings.evaluation, Path(settings.loop.output_dir)
    sampler = Sampler.parse(evaluation.sampler)
    if sampler != Sampler():
        sampler.become_default(pipeline)
        pipeline.save_pretrained(output_dir / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    if evaluation.num_samples:
        rows = held_out_rows(validation, 2 * evaluation.num_samples)
        held_out = rows["input_ids"]
        sources = None
        if "given" in rows:
            sources = sources_of(*(real_part(some, evaluation.num_samples) for some in (held_out, rows["given"])))
        sequences, texts = sample(
            pipeline,
            evaluation.num_samples,
            evaluation.num_inference_steps,
            seed=settings.loop.seed,
            batch_size=evaluation.batch_size,
            sources=sources,
        )
        title = f"Samples after {settings.loop.max_steps} steps"
        (output_dir / "samples.md").write_text(samples_text(texts, title), encoding="utf-8")
        judge = load_judge(evaluation.judge, device=pipeline.device) if evaluation.judge else None
        real, scorer = beside_real_text(held_out, len(texts), pipeline.tokenizer, judge, evaluation.judge_batch_size)
        scored = scorer.score(sequences)
        run_results = replace(
            run_results,
            samples=scored.samples,
            judge=judge_conditions(judge) if judge else None,
            mauve=scored.mauve,
            sample_scores=scored.scores,
            real_scores=scorer.score(real).scores,
            # whose denoiser is told nothing
            ladder=[]
            if sources is not None or missing_encoders(pipeline)
            else quality_ladder(pipeline, real, scorer, evaluation.batch_size),
            given_in_part=[
                write_and_score(
                    pipeline,
                    real,
                    task,
                    evaluation.num_inference_steps,
                    settings.loop.seed,
                    evaluation.batch_size,
                    scorer,
                )
                for task in tasks_of(pipeline, real.shape[1])
            ],
        )
    run_results.save(output_dir / "results.json")
    # from the files, as the command that writes a card again does
    run = read_run(output_dir)
    card = write_card(run, output_dir / run.result_folder)
    print(card.text)


def tasks_of(pipeline: DiffusionPipeline, sequence_length: int) -> list[Task]:
    """What a pipeline can be given of texts that are long enough for it: nothing, where it takes no prompts."""
    way = conditioning(pipeline)
    if way is None or pipeline.config.get("source_length") or sequence_length < 8:
        return []
    continuation = Task.continuation(sequence_length)
    return [continuation] if way == "prompt_ids" else [continuation, Task.infilling(sequence_length)]


def describe(settings: TrainingSettings, sequence_length: int) -> RunResults:
    """What settings alone say of a run. No path of the machine is left in it."""
    values = flatten(asdict(settings))
    keys = [key for key in differences(settings, to_yaml(type(settings)())) if key in values]
    components, backbone = values.get("components"), values.get("model.backbone")
    return RunResults(
        changed_settings={key: without_path(values[key]) for key in keys if key not in MACHINE_SETTINGS},
        sequence_length=sequence_length,
        corpus=source(settings.data.source),
        token_encoder=source(backbone) if backbone and not components else None,
        components=source(components) if components else None,
    )
