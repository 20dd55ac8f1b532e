"""What is made with a pipeline to evaluate it: samples, and texts on lines between the latents of real ones.

Every sample has randomness of its own, so that sample i of a seed is the same in any batch and on any process, and the
same for every number of steps. What is made is kept batch by batch; what is there already is not made again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..pipelines.prompts import GivenTokens
from .part_cache import Rows, digest, module_digest, public_config
from .samplers import Sampler


@dataclass(frozen=True)
class Subject:
    """A pipeline that is evaluated, with a way to sample it.

    `digest` is of its components and of the arguments that its call takes, `vocabulary` of its tokenizer's;
    `sequence_length` is in tokens, `takes_steps` says whether its number of steps can be chosen, `conditioning` is the
    argument of its call that says which tokens are given (None: it takes none), `has_roles` whether its denoiser was
    trained with such, `source_length` counts the tokens of a
    source, and `missing_encoders` are the components that `encode` needs and that it lacks.
    """

    name: str
    source: str
    dtype: str
    sampler: Sampler
    sequence_length: int
    takes_steps: bool
    conditioning: str | None
    has_roles: bool
    source_length: int | None
    digest: str
    vocabulary: str
    missing_encoders: tuple[str, ...]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, name: str, source: str, dtype: str, sampler: Sampler) -> Subject:
        """What is to be known of a pipeline, with its sampler's scheduler, before its turn comes."""
        parts: dict[str, Any] = {
            part: module_digest(component)
            if isinstance(component, torch.nn.Module)
            else [type(component).__name__, public_config(component)]
            for part, component in sorted(pipeline.components.items())
            if component is not None and part != "tokenizer"
        }
        vocabulary = digest(pipeline.tokenizer.get_vocab())
        saved = {setting: pipeline.config[setting] for setting in getattr(pipeline, "guidance_settings", ())}
        arguments = {setting: value for setting, value in saved.items() if value is not None} | dict(sampler.arguments)
        return cls(
            name=name,
            source=source,
            dtype=dtype,
            sampler=sampler,
            sequence_length=pipeline.sequence_length,
            takes_steps=takes_steps(pipeline),
            conditioning=conditioning(pipeline),
            has_roles=has_roles(pipeline),
            source_length=pipeline.config.get("source_length"),
            digest=digest([parts, vocabulary, tuple(arguments.items())]),
            vocabulary=vocabulary,
            missing_encoders=missing_encoders(pipeline),
        )

    @property
    def told_without_encoders(self) -> bool:
        """Whether it takes no prompts for want of its encoders alone."""
        return self.conditioning is None and self.has_roles and bool(self.missing_encoders)

    @property
    def text_layout(self) -> tuple[str, int, int | None]:
        """What pipelines have in common that write into the same texts."""
        return self.vocabulary, self.sequence_length, self.source_length

    def steps(self, asked: Sequence[int]) -> Sequence[int]:
        """The numbers of steps that it is sampled with: where it has no choice, one for each token."""
        return asked if self.takes_steps else (self.sequence_length,)

    def load(self) -> DiffusionPipeline:
        """The pipeline, on the CPU; OSError if it cannot be loaded, or is another one by now."""
        pipeline = load_pipeline(self.source, self.dtype)
        self.sampler.apply(pipeline)
        if Subject.of(pipeline, self.name, self.source, self.dtype, self.sampler) != self:
            raise OSError(
                f"--pipeline {self.source!r} has changed since this evaluation has begun: wait until nobody writes "
                "there any more, and give the same command again."
            )
        return pipeline


def takes_steps(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline's call can be told how many steps to take."""
    return "num_inference_steps" in inspect.signature(type(pipeline).__call__).parameters


def conditioning(pipeline: DiffusionPipeline) -> str | None:
    """How a pipeline is told what is given: `given_tokens` anywhere, `prompt_ids` at the beginning, or not at all."""
    arguments = inspect.signature(type(pipeline).__call__).parameters
    if "prompt_ids" in arguments:
        return "prompt_ids"
    if "given_tokens" not in arguments:
        return None
    if hasattr(pipeline, "takes_prompts"):  # of models that read words
        return "given_tokens" if pipeline.takes_prompts else None
    return "given_tokens" if has_roles(pipeline) and not missing_encoders(pipeline) else None


def has_roles(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline's denoiser was trained with latents of texts given in part."""
    transformer = pipeline.components.get("transformer")
    return transformer is not None and bool(transformer.config.get("role_embeds"))


def missing_encoders(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """What a pipeline lacks to turn real texts into latents."""
    return tuple(getattr(pipeline, "missing_encoders", ["encoders"]))


def load_pipeline_with_encoders(source: str) -> DiffusionPipeline:
    """A pipeline in float32 that turns real texts into latents; ValueError for one that lacks what that needs, and
    OSError where there is none."""
    pipeline = load_pipeline(source, "float32")
    if missing := missing_encoders(pipeline):
        raise ValueError(
            f"--pipeline {source!r} lacks {' and '.join(missing)}, which turn held-out text into "
            "latents: name the pipeline as training saved it (RUN/pipeline), with its encoders."
        )
    return pipeline


def load_pipeline(source: str, dtype: str) -> DiffusionPipeline:
    """A pipeline that generates texts in evaluation's precision, or an OSError.

    Such a pipeline has a `tokenizer`, its `sequence_length` and, of its last call, `num_function_evaluations`. It is
    called with `batch_size`, where it takes that `num_inference_steps`, a `generator` for each text and
    `output_type="seq"`, and returns token ids (B, L) as `sequences`; where it decodes `latents`, these too.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True)
        if not hasattr(pipeline, "sequence_length"):
            raise ValueError(f"it is a {type(pipeline).__name__}, which generates no texts.")
    except (OSError, ValueError, AttributeError) as error:
        raise OSError(
            f"--pipeline {source!r} cannot be loaded: {error} Name the folder of a pipeline (RUN/pipeline), or its "
            "Hub id."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class SampleSet:
    """The samples of one pipeline, number of denoising steps and seed.

    `rows` keeps `sequences` (n, L), and of each sample `is_finite`, `seconds`, `batch_size` and `nfe`, the evaluations
    of the denoiser.
    """

    subject: Subject
    steps: int
    seed: int
    count: int
    rows: Rows

    @property
    def row_cost(self) -> int:
        """Passes of the denoiser for a sample."""
        return self.steps

    def missing_batches(self, batch_size: int) -> list[list[int]]:
        """Which samples are still to be made."""
        return self.rows.missing_batches(self.count, batch_size)

    def sample(self, pipeline: DiffusionPipeline, indices: list[int]) -> BaseOutput:
        """The pipeline's output for some of the set."""
        return sample_rows(pipeline, self.steps, self.seed, indices, **dict(self.subject.sampler.arguments))

    def make(self, pipeline: DiffusionPipeline, indices: list[int], batch_size: int) -> None:
        """Samples some of the set, and keeps them; `batch_size` is what was asked for, the last batch is smaller."""
        start = time.perf_counter()
        output = self.sample(pipeline, indices)
        # a device may still be at work: copying waits for it
        sequences = output.sequences.cpu()
        seconds = time.perf_counter() - start
        values = {
            "sequences": sequences.int(),
            "is_finite": output.get("latents", sequences).isfinite().flatten(1).all(1),
            "seconds": torch.full((len(indices),), seconds / len(indices), dtype=torch.float64),
            "batch_size": torch.full((len(indices),), batch_size),
            "nfe": torch.full((len(indices),), pipeline.num_function_evaluations),
        }
        self.rows.save(indices, values)


def sample_rows(
    pipeline: DiffusionPipeline, steps: int, seed: int, indices: list[int], **arguments: Any
) -> BaseOutput:
    """The pipeline's output for n samples of a seed, each of which is the same in any batch."""
    if takes_steps(pipeline):
        arguments["num_inference_steps"] = steps
    output = pipeline(
        batch_size=len(indices),
        generator=[sample_generator(seed, index, pipeline.device) for index in indices],
        output_type="seq",
        **arguments,
    )
    output.sequences = fill_behind_ends(pipeline, output.sequences)
    return output


def fill_behind_ends(pipeline: DiffusionPipeline, sequences: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Token ids (B, L) as a pipeline's texts have them: behind the first end-of-text token from `start` on are no
    others, where its texts end at one."""
    if not pipeline.config.get("ends_texts"):
        return sequences
    end = pipeline.fill_token_id
    is_over = torch.cat([torch.zeros_like(sequences[:, :start]), sequences[:, start:] == end], dim=1).cumsum(1) > 0
    return sequences.masked_fill(is_over, end)


def sample_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """The source of all noise of one sample, on the device that the noise is needed on."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


@dataclass(frozen=True)
class Lines:
    """Lines between the latents of pairs of real texts, decoded at evenly spaced positions (Fig. 3, left).

    `ends` are token ids (pairs, 2, L), `positions` lie in [0, 1] (K,), and `rows` keeps `sequences` (pairs, K, L).
    """

    subject: Subject
    ends: torch.Tensor
    positions: torch.Tensor
    rows: Rows
    row_cost: ClassVar[int] = 1

    def missing_batches(self, batch_size: int) -> list[list[int]]:
        """Which lines are still to be made; a line is K points to decode."""
        return self.rows.missing_batches(len(self.ends), max(1, batch_size // len(self.positions)))

    @torch.no_grad()
    def make(self, pipeline: DiffusionPipeline, indices: list[int], batch_size: int) -> None:
        """Decodes some of the lines, at most `batch_size` points at a time, and keeps them."""
        first, second = (pipeline.encode_sequences(self.ends[indices, end]) for end in (0, 1))  # (B, N, d_z)
        weights = self.positions.to(first.device)[None, :, None, None]
        points = torch.lerp(first[:, None], second[:, None], weights).flatten(0, 1)  # (B K, N, d_z)
        sequences = torch.cat([pipeline.decode_to_sequences(some).cpu() for some in points.split(batch_size)])
        self.rows.save(indices, {"sequences": sequences.int().unflatten(0, (len(indices), -1))})


def pairs_of(sequences: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random pairs of sequences (n, L), none of which is in two: (count, 2, L); the same at each call."""
    order = np.random.default_rng(0).permutation(len(sequences))[: 2 * count]
    return sequences[torch.from_numpy(order)].unflatten(0, (count, 2))


def sources_of(sequences: torch.Tensor, given: torch.Tensor) -> GivenTokens:
    """What is given of pairs (n, L)."""
    return GivenTokens(sequences, given, [sequences.shape[1]] * len(sequences))


def sample(
    pipeline: DiffusionPipeline,
    count: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int,
    sources: GivenTokens | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """`count` samples of a pipeline, those that `evaluate.py` makes of this seed: token ids (count, L) and texts. With
    `sources`, sample i is written behind the i-th of them, from the first again after the last."""
    outputs = []
    for batch in torch.arange(count).split(batch_size):
        given = {} if sources is None else {"given_tokens": sources[batch % len(sources.lengths)]}
        outputs.append(sample_rows(pipeline, num_inference_steps, seed, batch.tolist(), **given))
    sequences = torch.cat([output.sequences.cpu() for output in outputs])
    return sequences, pipeline.tokenizer.batch_decode(sequences, skip_special_tokens=True)
