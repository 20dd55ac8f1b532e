"""Texts that are given in part: continuations of held-out prompts, and filled gaps, with what they are scored by.

Held-out sequences of L tokens have the same place to be written, `Task.written`; everything else of them is given. A
text is scored *where it stands*: the judge reads the real tokens before the place and scores what is written together
with the real tokens behind it, so that a gap counts as filled well if what follows fits, too. Two controls tell
whether a model heeds what it is given: the same written tokens where *another* sequence was given, and what was really
written there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerBase

from ..metrics.bert_score import TokenMatcher, bert_score
from ..metrics.generative_perplexity import generative_perplexity
from ..metrics.judge import Judge
from ..metrics.ngram_diversity import unique_ngram_share
from ..metrics.registry import References, TextSet
from ..metrics.repetition import repetition
from ..metrics.rouge_l import rouge_l
from ..pipelines.prompts import GivenTokens
from .options import EvaluationOptions
from .part_cache import FinishedParts, digest
from .samples import SampleSet, Subject, conditioning, fill_behind_ends, has_roles, sample_generator, takes_steps
from .scores import SetScorer


# 1. The task


@dataclass(frozen=True)
class Task:
    """What is written of sequences of `length` tokens: those from `start` to `stop`; the others are given."""

    name: str
    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, options: EvaluationOptions, sequence_length: int, source_length: int | None = None) -> Task:
        """The task of an evaluation; ValueError where prompt or gap do not fit the model's texts. What is continued of
        pairs are their sources."""
        if source_length is not None:
            if options.task != "continuation" or options.prompt_tokens is not None:
                raise ValueError(
                    f"--task {options.task} with --prompt_tokens {options.prompt_tokens}: of pairs, whose sources are "
                    f"{source_length} tokens here, targets are written; give --task continuation alone."
                )
            return cls("continuation", source_length, sequence_length, sequence_length)
        if options.task == "continuation":
            start = cls.continuation(sequence_length).start if options.prompt_tokens is None else options.prompt_tokens
            if start >= sequence_length:
                raise ValueError(
                    f"--prompt_tokens {start} leaves nothing to write of the models' {sequence_length} tokens."
                )
            return cls("continuation", start, sequence_length, sequence_length)
        task = cls.infilling(sequence_length, options.gap_tokens)
        if not 0 < task.start < task.stop < sequence_length:
            raise ValueError(
                f"--gap_tokens {task.stop - task.start}: a gap has tokens on both sides, and texts have "
                f"{sequence_length}."
            )
        return task

    @classmethod
    def continuation(cls, sequence_length: int) -> Task:
        """The second half is written."""
        return cls("continuation", sequence_length // 2, sequence_length, sequence_length)

    @classmethod
    def infilling(cls, sequence_length: int, gap_tokens: int | None = None) -> Task:
        """So many tokens in the middle are written, by default a quarter of all."""
        size = sequence_length // 4 if gap_tokens is None else gap_tokens
        start = (sequence_length - size) // 2
        return cls("infilling", start, start + size, sequence_length)

    @property
    def written(self) -> slice:
        """The places that are written."""
        return slice(self.start, self.stop)

    def reached(self, sequences: torch.Tensor, end_token_id: int) -> torch.Tensor:
        """Bool (n,), which texts (n, L), filled up with end-of-text tokens, are not over where writing begins."""
        return sequences[:, self.start] != end_token_id

    def given(self, told: str = "all") -> torch.Tensor:
        """Bool (L,), what a model is told: `all` that is given, or the `prefix` alone."""
        places = torch.arange(self.length)
        return (places < self.start) | ((places >= self.stop) & (told == "all"))

    def put_in(self, sequences: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Sequences (n, L) with the written tokens of others (n, L)."""
        return torch.cat([sequences[:, : self.start], written[:, self.written], sequences[:, self.stop :]], dim=1)


# 2. Writing


def write_into(
    pipeline: DiffusionPipeline,
    real: torch.Tensor,
    task: Task,
    generators: list[torch.Generator],
    told: str = "all",
    guidance_scale: float | None = None,
    **arguments: Any,
) -> BaseOutput:
    """A pipeline's output, whose `sequences` (B, L) are `real` ones of which a part was written.

    Args:
        told: what the pipeline is told of the others, see [`Task.given`]; or `steering`, where it takes no prompts and
            is steered by the likelihood of the given tokens, whose weight `guidance_scale` is then.
        guidance_scale: weight of what is given, which a model of latents knows; None leaves it out.
        arguments: others of the pipeline's call.
    """
    arguments |= {"generator": generators}
    if told == "steering":
        reward = given_likelihood(pipeline, real, task.given())
        return pipeline.steer(latent_reward=reward, scale=guidance_scale, batch_size=len(real), **arguments)
    arguments["output_type"] = "seq"
    if conditioning(pipeline) == "prompt_ids":
        output = pipeline(prompt_ids=real[:, : task.start], max_new_tokens=task.stop - task.start, **arguments)
    else:
        given = task.given(told).expand(len(real), -1)
        if guidance_scale is not None and has_roles(pipeline):
            arguments["guidance_scale"] = guidance_scale
        output = pipeline(given_tokens=GivenTokens(real, given, [task.length] * len(real)), **arguments)
    if told == "prefix":
        # what a model that does not know the suffix writes in its place is thrown away
        output.sequences = torch.cat(
            [output.sequences[:, : task.stop], real[:, task.stop :].to(output.sequences)], dim=1
        )
    if task.stop == task.length:
        output.sequences = fill_behind_ends(pipeline, output.sequences, task.start)
    return output


@dataclass(frozen=True)
class ConditionalSet(SampleSet):
    """What a pipeline writes, for one number of steps, seed and guidance, into the real sequences `real` (n, L); see
    [`write_into`].
    """

    task: Task
    real: torch.Tensor
    guidance_scale: float
    told: str

    @property
    def row_cost(self) -> int:
        """Passes of the network for a text."""
        return self.steps * (1 if self.guidance_scale == 1 or self.told == "steering" else 2)

    def sample(self, pipeline: DiffusionPipeline, indices: list[int]) -> BaseOutput:
        arguments = dict(self.subject.sampler.arguments)
        if self.subject.takes_steps:
            arguments["num_inference_steps"] = self.steps
        generators = [sample_generator(self.seed, index, pipeline.device) for index in indices]
        return write_into(
            pipeline, self.real[indices], self.task, generators, self.told, self.guidance_scale, **arguments
        )


def given_likelihood(
    pipeline: DiffusionPipeline, real: torch.Tensor, given: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reward that makes a pipeline continue prompts without being trained for it: clean latents (B, N, d_z) →
    log-likelihood (B,), by the decoders, of those of the tokens `real` (B, L) that are `given`, bool (L,)."""

    def reward(latents: torch.Tensor) -> torch.Tensor:
        hidden_states = latents.to(pipeline.token_decoder.dtype)
        if pipeline.latent_decoder is not None:
            hidden_states = pipeline.latent_decoder(latents.to(pipeline.latent_decoder.dtype)).hidden_states
        logits = pipeline.token_decoder(hidden_states).logits[:, given].float()  # (B, P, V)
        tokens = real[:, given].to(logits.device)
        return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").sum(1)

    return reward


def make_sets(
    subjects: list[Subject],
    real: torch.Tensor,
    task: Task,
    options: EvaluationOptions,
    parts: FinishedParts,
    device: str,
) -> list[ConditionalSet]:
    """The sets that are asked for: with each guidance, and for gaps also told the prefix alone; a model that writes
    from the left is told no more than that. Models of words know no guidance; what takes no prompts is steered."""
    sets = []
    for subject in subjects:
        if subject.told_without_encoders and not options.steering_scales:
            raise ValueError(
                f"--task {task.name}: the pipeline {subject.name!r} takes prompts, but lacks "
                f"{' and '.join(subject.missing_encoders)}: save it with its encoders, or name another."
            )
        if subject.conditioning is None and not options.steering_scales:
            raise ValueError(
                f"--task {task.name}: the pipeline {subject.name!r} takes no prompts. Train it further with "
                "conditioning.prefix_share=0.25 conditioning.gaps_share=0.25 (docs/conditioning.md), or have it "
                "steered with --steering_scales."
            )
        if "guidance_scale" in dict(subject.sampler.arguments):
            raise ValueError(f"sampler {subject.sampler.text!r}: guidance_scale goes with --guidance_scales.")
        scales = options.guidance_scales if subject.has_roles else (1.0,)
        ways = [("all", scale) for scale in scales]
        if subject.conditioning == "prompt_ids":
            ways = [("prefix", 1.0)]
        elif subject.conditioning is None:
            ways = [("steering", scale) for scale in options.steering_scales]
        elif task.name == "infilling":
            ways += [("prefix", scale) for scale in scales]
        for steps, (told, scale), seed in itertools.product(subject.steps(options.steps), ways, range(options.seeds)):
            depends_on: dict[str, Any] = {
                "pipeline": subject.digest,
                "dtype": subject.dtype,
                "steps": steps,
                "seed": seed,
                "told": told,
                "guidance_scale": scale,
                "written": [task.start, task.stop],
                "real": digest(real.tolist()),
            }
            rows = parts.rows("conditional", **depends_on, device=device)
            sets.append(ConditionalSet(subject, steps, seed, len(real), rows, task, real, scale, told))
    return sets


# 3. Scoring


@dataclass(frozen=True)
class ConditionalScorer:
    """What all sets are scored with, beside the real sequences (n, L); `references` are those of MAUVE."""

    task: Task
    real: torch.Tensor
    tokenizer: PreTrainedTokenizerBase
    judge: Judge | None
    batch_size: int
    references: References | None
    matcher: TokenMatcher | None

    def score(self, sequences: torch.Tensor) -> dict[str, float | None]:
        """Every score of sequences (n, L) of which a part was written; but for `given_kept`, of that part around which
        everything else is real."""
        given = self.task.given()
        given_kept = float((sequences == self.real)[:, given].float().mean())
        sequences = self.task.put_in(self.real, sequences)
        written = sequences[:, self.task.written]
        texts, real_texts = self.texts(written), self.texts(self.real[:, self.task.written])
        whole = TextSet(
            sequences.tolist(), self.texts(sequences), self.judge, self.batch_size, references=self.references
        )
        return {
            **self.perplexities(sequences),
            "mauve": whole.mauve.get("mauve"),
            "rouge_l": rouge_l(texts, real_texts)["rouge_l"],
            "bert_score": None if self.matcher is None else bert_score(texts, real_texts, self.matcher)["bert_score"],
            "distinct_1": unique_ngram_share(written.tolist(), 1),
            "distinct_2": unique_ngram_share(written.tolist(), 2) if written.shape[1] > 1 else None,
            "repetition": repetition(sequences.tolist())["repetition"],
            "entropy": whole.entropy["entropy"],
            "given_kept": given_kept,
        }

    def perplexities(self, sequences: torch.Tensor) -> dict[str, float | None]:
        """Those of what is written in sequences (n, L), where it was written and in the places of the next ones."""
        elsewhere = self.task.put_in(self.real.roll(-1, 0), sequences)
        return {"perplexity": self.perplexity(sequences), "perplexity_elsewhere": self.perplexity(elsewhere)}

    def perplexity(self, sequences: torch.Tensor) -> float | None:
        """Perplexity of what stands from the written place on, given what is before; None where nothing is."""
        if self.judge is None:
            return None
        contexts, rests = [], []
        for before, text in zip(self.texts(sequences[:, : self.task.start]), self.texts(sequences), strict=True):
            # where tokens join across the border, or lose the space there, the rest begins a little earlier
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
            )
            contexts.append(text[:same])
            rests.append(text[same:])
        if not any(map(str.strip, rests)):
            return None
        return generative_perplexity(rests, self.judge, self.batch_size, contexts=contexts)["perplexity"]

    def texts(self, sequences: torch.Tensor) -> list[str]:
        """Token ids (n, T) → texts."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)


# 4. At the end of a run


def write_and_score(
    pipeline: DiffusionPipeline,
    real: torch.Tensor,
    task: Task,
    num_inference_steps: int,
    seed: int,
    batch_size: int,
    scorer: SetScorer,
) -> dict[str, Any]:
    """What a pipeline writes into real sequences (n, L), with its own guidance, for cards: the task, perplexities of
    what it wrote and of what was really written, and texts, each in the pieces before, within and behind the place."""
    arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps} if takes_steps(pipeline) else {}
    if pipeline.config.get("ends_texts"):
        real = real[task.reached(real, pipeline.fill_token_id)]
    written = []
    for indices in torch.arange(len(real)).split(batch_size):
        generators = [sample_generator(seed, index, pipeline.device) for index in indices.tolist()]
        written.append(write_into(pipeline, real[indices], task, generators, **arguments).sequences.cpu())
    sequences = torch.cat(written)
    own = ConditionalScorer(task, real, scorer.tokenizer, scorer.judge, scorer.batch_size, None, None)
    pieces = (slice(task.start), task.written, slice(task.stop, None))
    return {
        "task": task.name,
        "written": [task.start, task.stop],
        "num_texts": len(real),
        "perplexities": own.perplexities(sequences),
        "real_perplexities": own.perplexities(real),
        "samples": list(zip(*(own.texts(sequences[:, piece]) for piece in pieces), strict=True)),
    }
