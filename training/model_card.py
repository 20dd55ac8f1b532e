"""A run's results: samples and their scores beside real text, for people (`samples.md`) and for the Hub card.

    python training/model_card.py training/configs/NAME.yaml ... [--output_dir model_cards]

writes cards for configurations that have not been trained; such a card says so.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate.state import PartialState
from omegaconf import OmegaConf
from torch.utils.data import Dataset

import accelerate
import ldlm_hf
import ldlm_hf.hub.training_curves  # a missing matplotlib stops a run before training, not after it
from evaluation import held_out_sequences, sample
from ldlm_hf import GenerativePerplexity, LDLMPipeline, Mauve, NGramDiversity, TokenEntropy
from ldlm_hf.data.sources import is_local
from ldlm_hf.hub.model_card import Run, RunResults, Sample, Source, TextScores, read_run, write_card
from ldlm_hf.metrics import Judge, load_judge, text_features
from ldlm_hf.pretrained_sources import PACKAGE_PREFIX
from settings import EvaluationSettings, RunSettings, differences, flatten, load_settings, to_yaml


# settings that say where the machine keeps files, and nothing of the model
MACHINE_SETTINGS = ("data.cache_dir", "loop.output_dir")
# with fewer texts MAUVE has no two clusters to compare
MIN_MAUVE_TEXTS = 20


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
        scores = score_beside_real_text(sequences, texts, held_out, held_out_texts, evaluation, pipeline.device)
        run_results = replace(run_results, **scores)
    run_results.save(output_dir / "results.json")
    # from the files, as the command that writes a card again does
    card = write_card(read_run(output_dir), output_dir / "pipeline")
    print(card.text)


def describe(settings: Any, sequence_length: int) -> RunResults:
    """What settings alone say of a run. No path of the machine is left in it."""
    values = flatten(OmegaConf.to_container(OmegaConf.structured(settings)))
    keys = [key for key in differences(settings, to_yaml(type(settings)())) if key in values]
    joint = isinstance(settings, RunSettings)
    return RunResults(
        changed_settings={key: without_path(values[key]) for key in keys if key not in MACHINE_SETTINGS},
        sequence_length=sequence_length,
        corpus=source(settings.data.source),
        token_encoder=source(settings.model.backbone) if joint else None,
        components=None if joint else source(settings.components),
    )


def without_path(value: Any) -> Any:
    """A setting's value; of a path on this machine only its last part."""
    if not isinstance(value, str):
        return value
    is_path = value.startswith((".", "~")) or Path(value).is_absolute() or Path(value).exists()
    return Path(value).name if is_path else value


def source(name: str) -> Source:
    """Where a model or a corpus came from. To be called where the run takes place: it looks whether a path exists."""
    if name.startswith(PACKAGE_PREFIX):
        return Source(name, is_hub_id=False)
    if is_local(name):
        return Source(Path(name).name, is_hub_id=False)
    return Source(name, is_hub_id=True)


def hardware(device: torch.device) -> str:
    """The processors of a run, in words."""
    processes = PartialState().num_processes
    if device.type == "cuda":
        return f"{processes} × {torch.cuda.get_device_name(device)}"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    model = next(names, platform.processor() or platform.machine())
    return f"{model} (CPU; processes: {processes}, threads of each: {torch.get_num_threads()})"


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = (ldlm_hf, torch, diffusers, transformers, accelerate)
    return {"Python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}


def score_beside_real_text(
    sequences: torch.Tensor,
    texts: list[str],
    held_out: torch.Tensor,
    held_out_texts: list[str],
    settings: EvaluationSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Scores of samples (n, L) and of n held-out texts: the fields of [`RunResults`] that they fill.

    Of the held-out texts, every other one is scored; those between are the references of MAUVE for both.
    """
    count = len(texts)
    judge = load_judge(settings.judge, device=device) if settings.judge else None
    stride = 2 if len(held_out_texts) >= 2 * count else 1
    scored, real_texts = held_out[::stride][:count], held_out_texts[::stride][:count]
    references = held_out_texts[1::2][:count] if stride == 2 else []
    sample_scores, samples, conditions = score_set(sequences, texts, judge, settings.judge_batch_size)
    real_scores, _, _ = score_set(scored, real_texts, judge, settings.judge_batch_size)
    fields = {"samples": samples, "judge": conditions, "mauve": None}
    written = sum(bool(text.strip()) for text in texts)
    if (
        judge is not None
        and len(references) == count
        and written >= MIN_MAUVE_TEXTS
        and all(map(str.strip, references))
    ):
        features = text_features(references, judge, settings.judge_batch_size)
        arguments = {"references": references, "judge": judge, "reference_features": features}
        arguments["batch_size"] = settings.judge_batch_size
        mauve = Mauve().compute(predictions=texts, **arguments)
        sample_scores = replace(sample_scores, mauve=mauve["mauve"])
        real_scores = replace(real_scores, mauve=Mauve().compute(predictions=real_texts, **arguments)["mauve"])
        fields["mauve"] = {key: mauve[key] for key in ("num_texts", "num_buckets", "max_length", "seed")}
    return fields | {"sample_scores": sample_scores, "real_scores": real_scores}


def score_set(
    sequences: torch.Tensor, texts: list[str], judge: Judge | None, batch_size: int
) -> tuple[TextScores, list[Sample], dict[str, Any] | None]:
    """Scores of a set of token ids (n, L) and of each of its texts; and the judge's conditions, if there is one."""
    rows = sequences.tolist()
    entropy = TokenEntropy().compute(predictions=rows)
    scores = TextScores(
        num_texts=len(texts),
        entropy=entropy["entropy"],
        diversity=NGramDiversity().compute(predictions=rows)["diversity"],
    )
    perplexities: list[float | None] = [None] * len(texts)
    conditions = None
    if judge is not None:
        perplexity = GenerativePerplexity().compute(predictions=texts, judge=judge, batch_size=batch_size)
        perplexities = perplexity["perplexities"]
        scores = replace(scores, generative_perplexity=perplexity["perplexity"])
        conditions = {"name": source(judge.name).name} | {key: perplexity[key] for key in ("max_length", "add_bos")}
    samples = [Sample(*values) for values in zip(texts, perplexities, entropy["entropies"], strict=True)]
    return scores, samples, conditions


def write_template_card(config: Path, output_dir: Path) -> None:
    """The card of a configuration that has not been trained, in a folder of its name."""
    settings: RunSettings = load_settings(RunSettings, str(config), [])
    plain = OmegaConf.to_container(OmegaConf.structured(settings))
    results = describe(settings, settings.model.sequence_length)
    write_card(Run(config.stem, plain, results), output_dir / config.stem)


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
