"""A run's results: samples and their scores beside real text, for people (`samples.md`) and for the Hub card.

    python training/model_card.py training/configs/NAME.yaml ... [--output_dir model_cards]

writes cards for configurations that have not been trained; such a card says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import ldlm_hf.hub.training_curves  # noqa: F401  a missing matplotlib stops a run before training, not after it
from evaluation import held_out_sequences, sample
from ldlm_hf import LDLMPipeline
from ldlm_hf.hub.model_card import Run, RunResults, read_run, write_card
from ldlm_hf.metrics import load_judge
from provenance import hardware, source, versions, without_path
from settings import RunSettings, differences, flatten, load_settings, to_yaml
from text_scores import score_beside_real_text


# settings that say where the machine keeps files, and nothing of the model
MACHINE_SETTINGS = ("data.cache_dir", "loop.output_dir")


def samples_text(texts: Sequence[str], title: str) -> str:
    """Samples as Markdown, quoted whole."""
    return f"# {title}\n\n" + "\n\n".join(f"**{number}.** {text}" for number, text in enumerate(texts, 1)) + "\n"


def write_results(
    pipeline: LDLMPipeline,
    validation: Dataset[dict[str, torch.Tensor]],
    settings: Any,
    results: dict[str, float],
    seconds: float,
    license: str | None = None,
    language: str | None = None,
    model_id: str | None = None,
) -> None:
    """Samples a trained pipeline, scores it beside real text, and writes `samples.md`, `results.json` and the card.

    Args:
        pipeline: the trained pipeline, already saved in the run's folder.
        validation: held-out sequences, the real text of the table. MAUVE is measured if there are twice as many of
            them as samples.
        settings: the run's settings, of joint training or of a token decoder.
        results: the final evaluation.
        seconds: what training took.
        license: identifier of the model's licence on the Hub; not guessed.
        language: code of the language of the training text.
        model_id: the model's id on the Hub.
    """
    evaluation, output_dir = settings.evaluation, Path(settings.loop.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    components = {name: module for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    held_out = held_out_sequences(validation, max(1, 2 * evaluation.num_samples))
    run_results = replace(
        describe(settings, held_out.shape[1]),
        license=license,
        language=language,
        model_id=model_id,
        parameters={
            name: sum(weight.numel() for weight in module.parameters()) for name, module in components.items()
        },
        hardware=hardware(pipeline.device),
        versions=versions(),
        seconds=seconds,
        held_out={name: value for name, value in results.items() if "/" not in name},
        num_held_out=min(evaluation.num_sequences, len(validation)),  # type: ignore[arg-type]
    )
    if evaluation.num_samples:
        sequences, texts = sample(pipeline, evaluation, evaluation.num_samples, seed=settings.loop.seed)
        title = f"Samples after {settings.loop.max_steps} steps"
        (output_dir / "samples.md").write_text(samples_text(texts, title), encoding="utf-8")
        held_out_texts = pipeline.tokenizer.batch_decode(held_out, skip_special_tokens=True)
        judge = load_judge(evaluation.judge, device=pipeline.device) if evaluation.judge else None
        scores = score_beside_real_text(sequences, texts, held_out, held_out_texts, judge, evaluation.judge_batch_size)
        run_results = replace(run_results, **scores)
    run_results.save(output_dir / "results.json")
    # from the files, as the command that writes a card again does
    card = write_card(read_run(output_dir), output_dir / "pipeline")
    print(card.text)


def describe(settings: Any, sequence_length: int) -> RunResults:
    """What settings alone say of a run. No path of the machine is left in it."""
    values = flatten(asdict(settings))
    keys = [key for key in differences(settings, to_yaml(type(settings)())) if key in values]
    return RunResults(
        changed_settings={key: without_path(values[key]) for key in keys if key not in MACHINE_SETTINGS},
        sequence_length=sequence_length,
        corpus=source(settings.data.source),
        token_encoder=None if settings.components else source(settings.model.backbone),
        components=source(settings.components) if settings.components else None,
    )


def write_template_card(config: Path, output_dir: Path) -> None:
    """The card of a configuration that has not been trained, in a folder of its name."""
    settings: RunSettings = load_settings(RunSettings, str(config), [])
    results = describe(settings, settings.model.sequence_length)
    write_card(Run(config.stem, asdict(settings), results), output_dir / config.stem)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the cards of configurations that have not been trained.")
    parser.add_argument("configs", type=Path, nargs="+", help="YAML files of training/configs/")
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"), help="folder of the cards' folders")
    options = parser.parse_args(arguments)
    for config in options.configs:
        write_template_card(config, options.output_dir)
        print(options.output_dir / config.stem / "README.md")


if __name__ == "__main__":
    main()
