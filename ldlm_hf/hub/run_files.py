"""What a run leaves in its folder for its card: `settings.yaml`, `metrics.jsonl` and `results.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..objective import ConditioningSettings


@dataclass(frozen=True)
class Source:
    """Where a frozen model or a corpus came from.

    Attributes:
        name: its Hub id, its place in a package, or the last part of a local path: no card names a machine's folders.
        is_hub_id: whether the name is an id of the Hub.
    """

    name: str
    is_hub_id: bool


@dataclass(frozen=True)
class TextScores:
    """What is known of one set of texts; None was not measured.

    Attributes:
        num_texts: size of the set.
        values: its scores, by their names in `metrics.registry.SCORES`.
        num_blank_texts: texts of white space only.
        num_unscored_texts: texts that are too short for the judge to score.
        num_nonfinite_texts: texts decoded from latents that were not all finite.
    """

    num_texts: int
    values: dict[str, float | None] = field(default_factory=dict)
    num_blank_texts: int | None = None
    num_unscored_texts: int | None = None
    num_nonfinite_texts: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The scores and counts as one mapping."""
        values = asdict(self)
        return {"num_texts": values.pop("num_texts"), **values.pop("values"), **values}

    @classmethod
    def from_json(cls, mapping: dict[str, Any]) -> TextScores:
        """What `to_json` gives; a score that was not there yet when it was written has no value."""
        counts = {one.name for one in fields(cls)} & mapping.keys()
        values = {name: value for name, value in mapping.items() if name not in counts}
        return cls(values=values, **{name: mapping[name] for name in counts})


@dataclass(frozen=True)
class Sample:
    """One sampled text with its own scores; None was not measured, or there was nothing to score."""

    text: str
    perplexity: float | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class RunResults:
    """What a run leaves as `results.json`: how it was set up, and what was measured at its end.

    Attributes:
        changed_settings: dotted keys of the settings that differ from the defaults, without the machine's paths.
        sequence_length: tokens L of a text.
        pipeline: name of the trained pipeline's class.
        corpus: the training text.
        license: identifier of the model's licence on the Hub; None is not stated.
        language: code of the language that the model writes; None is not known.
        model_id: the model's id on the Hub; None has none.
        token_encoder: the frozen language model of a joint run.
        components: what a run starts from that trains a token decoder alone, or a student.
        parameters: component → number of its parameters.
        hardware: processors that the run was trained on.
        versions: package → its version.
        seconds: of training; None is a run that has not taken place.
        held_out: final evaluation on held-out text, name → value.
        num_held_out: sequences of that evaluation.
        judge: of `generative_perplexity` and `mauve`: `name`, and `max_length` and `add_bos` of the former.
        mauve: what the score depends on beside the judge: `num_texts`, `num_buckets`, `max_length` and `seed`.
        sample_scores, real_scores: of the samples, and of held-out real texts.
        ladder: what lies between the two (`evaluation/quality_ladder.py`); empty where it was not measured.
        given_in_part: what was written into held-out texts (`evaluation/conditional.py`): `task`, `written` (first and
            last place), `num_texts`, `perplexities`, `real_perplexities` and `samples`; empty where none was given.
    """

    changed_settings: dict[str, Any]
    sequence_length: int
    corpus: Source
    pipeline: str = "LDLMPipeline"
    license: str | None = None
    language: str | None = None
    model_id: str | None = None
    token_encoder: Source | None = None
    components: Source | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    num_held_out: int = 0
    judge: dict[str, Any] | None = None
    mauve: dict[str, Any] | None = None
    sample_scores: TextScores | None = None
    real_scores: TextScores | None = None
    ladder: list[dict[str, Any]] = field(default_factory=list)
    given_in_part: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Writes the results as JSON."""
        sets = {"sample_scores": self.sample_scores, "real_scores": self.real_scores}
        values = asdict(self) | {name: scores and scores.to_json() for name, scores in sets.items()}
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> RunResults:
        """Reads what `save` has written.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else.
        """
        if not file.is_file():
            raise OSError(f"{file} is not there: a run writes it at its end, and a card needs it.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            for name in ("corpus", "token_encoder", "components"):
                if values.get(name) is not None:
                    values[name] = Source(**values[name])
            for name in ("sample_scores", "real_scores"):
                if values.get(name) is not None:
                    values[name] = TextScores.from_json(values[name])
            values["samples"] = [Sample(**sample) for sample in values.get("samples", [])]
            return cls(**values)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} does not hold the results of a run ({error}); let the run write it.") from error


@dataclass(frozen=True)
class Run:
    """What a card is written from.

    Attributes:
        name: of the model.
        settings: the sections of `settings.yaml`.
        results: of `results.json`.
        log: lines of `metrics.jsonl`.
    """

    name: str
    settings: dict[str, Any]
    results: RunResults
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether there is a model; without one, the card is a template."""
        return self.results.seconds is not None

    @property
    def is_latent_diffusion(self) -> bool:
        """Whether it is an LDLM, and no method that one is compared with."""
        return self.results.pipeline == "LDLMPipeline"

    @property
    def takes_steps(self) -> bool:
        """Whether the number of its sampling steps can be chosen."""
        return self.results.pipeline != "AutoregressivePipeline"

    @property
    def takes_prompts(self) -> bool:
        """Whether it continues prompts: a model that writes from the left does, an LDLM that was trained for it, and
        one that diffuses words where it was scored by that."""
        if self.results.pipeline == "AutoregressivePipeline":
            return True
        if self.results.pipeline == "TokenDiffusionPipeline":
            return bool(self.results.given_in_part)
        return ConditioningSettings(**self.settings.get("conditioning", {})).gives_texts

    @property
    def source_length(self) -> int | None:
        """Tokens of the sources that it writes targets for; None of other models."""
        return self.settings.get("data", {}).get("source_length")

    @property
    def distillation(self) -> str | None:
        """The method that the denoiser was distilled by; None if it was not."""
        return self.settings.get("method")

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The settings of the adapter of a pipeline that was trained; None where whole weights were."""
        return self.settings.get("lora")

    @property
    def result_folder(self) -> str:
        """Where the run's folder has what was trained, and its card."""
        return "pipeline" if self.adapter is None else "lora"


def read_run(folder: str | Path) -> Run:
    """Reads a run's own files.

    Raises:
        OSError: `settings.yaml`, `metrics.jsonl` or `results.json` is not there.
        ValueError: one of them does not hold what a run writes.
    """
    folder = Path(folder)
    settings, log = read_settings_and_log(folder)
    return Run(folder.resolve().name, settings, RunResults.load(folder / "results.json"), log)


def read_settings_and_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run has written when it is not yet at its end: sections of `settings.yaml`, lines of `metrics.jsonl`.

    Raises:
        OSError: one of them is not there.
        ValueError: one of them does not hold what a run writes.
    """
    for name in ("settings.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise OSError(f"{folder} holds no {name}: it is not the folder of a run.")
    settings = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not {"data", "loop", "optimizer", "evaluation"} <= settings.keys():
        raise ValueError(
            f"{folder / 'settings.yaml'} must hold the sections data, loop, optimizer and evaluation of a run."
        )
    log = []
    for number, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("an object with a step is expected")
            log.append(record)
        except ValueError as error:
            raise ValueError(
                f"{folder / 'metrics.jsonl'}, line {number}: not a line of a run's log ({error}). A run that was "
                "killed may leave half a line at the end; it takes that away when it is resumed."
            ) from error
    return settings, log
