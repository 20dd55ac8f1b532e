"""Text generation with any of the token-level diffusion models: which one it is, its network and scheduler say."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerBase

from ..loading.lora import LDLMLoraLoaderMixin
from ..loading.repository import RepositoryPipeline
from ..pipelines.pipeline_output import LDLMPipelineOutput
from ..pipelines.prompts import (
    GivenTokens,
    as_texts,
    continued_rows,
    cut_rows,
    rows_with_gaps,
    tokenize,
    tokenize_suffix,
)
from ..pipelines.sampling import StepCallback, check_counts
from ..schedulers import TOKEN_SCHEDULERS
from .categorical import row_generators
from .token_transformer import TokenDiffusionTransformer


class TokenDiffusionPipeline(RepositoryPipeline, LDLMLoraLoaderMixin):
    r"""
    Pipeline for text generation with MDLM, ReMDM, Duo, psi-samplers, CANDI, FLM or FMLM, which is called like
    [`LDLMPipeline`].

        pipe = TokenDiffusionPipeline.from_pretrained("mdlm")
        pipe.scheduler = ReMDMScheduler(eta=0.015)
        texts = pipe("It was a dark and", num_inference_steps=256).texts

    Args:
        transformer ([`TokenDiffusionTransformer`]): logits of the clean words.
        scheduler ([`TokenScheduler`]): the sampler, of the process that the transformer was trained with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of its words.

    Raises:
        ValueError: components that do not fit each other.
    """

    scheduler_classes = tuple(TOKEN_SCHEDULERS)
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["sample", "logits"]

    def __init__(
        self,
        transformer: TokenDiffusionTransformer,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)
        if len(tokenizer) > transformer.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, and the transformer vocab_size="
                f"{transformer.config.vocab_size}; use the tokenizer that it was trained with."
            )
        self.check_scheduler()
        self.num_timesteps = 0
        self.num_function_evaluations = 0
        self._interrupt = False

    @property
    def sequence_length(self) -> int:
        """Tokens L of a text."""
        return self.transformer.config.sample_size

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback asks for that with `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def takes_prompts(self) -> bool:
        """Whether some words of a text may be given."""
        return self.scheduler.takes_given

    def check_scheduler(self) -> None:
        """Raises ValueError for a scheduler of another process, vocabulary or kind of network than the transformer."""
        name, scheduler, config = type(self.scheduler).__name__, self.scheduler, self.transformer.config
        if name not in TOKEN_SCHEDULERS or scheduler.process != config.process:
            raise ValueError(
                f"{name} is for other models: this transformer was trained with the process {config.process!r}. Use a "
                "scheduler of that, of " + ", ".join(TOKEN_SCHEDULERS) + "."
            )
        if scheduler.config.get("vocab_size", config.vocab_size) != config.vocab_size:
            raise ValueError(
                f"{name} has vocab_size={scheduler.config.vocab_size} and the transformer {config.vocab_size}: give "
                "the scheduler the transformer's."
            )
        if name == "FMLMScheduler" and not config.next_timestep_conditioning:
            raise ValueError(
                "FMLMScheduler takes steps of a flow map, which this transformer is not "
                "(next_timestep_conditioning=False): use FLMScheduler."
            )

    def rows_of(
        self,
        prompt: str | list[str] | None,
        suffix: str | list[str] | None,
        num_texts_per_prompt: int,
        max_new_tokens: int | None,
    ) -> GivenTokens:
        """Rows around prompts and suffixes, of which one holds for all of the other; ValueError where they do not fit
        each other or the model."""
        prompts = as_texts("prompt", "" if prompt is None else prompt)
        suffixes = as_texts("suffix", "" if suffix is None else suffix)
        count = max(len(prompts), len(suffixes))
        if {len(prompts), len(suffixes)} - {1, count}:
            raise ValueError(f"`prompt` has {len(prompts)} texts and `suffix` {len(suffixes)}: give as many of both.")
        # a space before a word is often a part of its token, and what is written has its own
        prompt_ids = [tokenize(self.tokenizer, text.rstrip(" "), "prompt") for text in prompts]
        suffix_ids = [tokenize_suffix(self.tokenizer, text) for text in suffixes]
        prompt_ids, suffix_ids = (ids * (count // len(ids)) for ids in (prompt_ids, suffix_ids))
        rows = continued_rows(prompt_ids, suffix_ids, self.sequence_length, max_new_tokens)
        return GivenTokens.of_rows(rows, self.sequence_length).repeat(num_texts_per_prompt)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 128,
        generator: torch.Generator | list[torch.Generator] | None = None,
        suffix: str | list[str] | None = None,
        num_texts_per_prompt: int = 1,
        max_new_tokens: int | None = None,
        given_tokens: GivenTokens | None = None,
        reuse_predictions: bool = False,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> LDLMPipelineOutput | tuple:
        r"""
        Generates texts, or continues prompts.

        Args:
            prompt: what texts begin with, for masked models and CANDI.
            batch_size: number of texts, without a prompt.
            num_inference_steps: transitions; some schedulers evaluate the network once more (see them, and
                `num_function_evaluations` afterwards).
            generator: source of all noise; a list gives each text its own stream, so that it is the same text alone
                and in any batch.
            suffix: what texts end with.
            num_texts_per_prompt: texts for each prompt, one behind the other.
            max_new_tokens: tokens that are written; by default as many as a text has room for.
            given_tokens ([`GivenTokens`]): rows of tokens, any of which may be given, instead of prompts.
            reuse_predictions: of a masked model, whether a step after which no text of the batch has changed costs no
                evaluation: the network is not told the time.
            output_type: `"text"`: texts and token ids; `"seq"` or `"pt"`: token ids.
            return_dict: whether to return an [`LDLMPipelineOutput`] instead of a tuple `(sequences, texts)`.
            callback_on_step_end: called after each step as `callback(pipeline, step, timestep, tensors)`; what it
                returns under `"sample"` replaces it.
            callback_on_step_end_tensor_inputs: which of `sample` and `logits` the callback is given; `["sample"]` by
                default.

        Raises:
            ValueError: an argument out of its range, a scheduler that does not fit the transformer, prompts that leave
                no room, or for a model that takes none.
        """
        # 1. Check inputs
        self.check_scheduler()
        check_counts(batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt)
        if output_type not in ("text", "seq", "pt"):
            raise ValueError(f"`output_type` must be text, seq or pt, got {output_type!r}.")
        if reuse_predictions and self.transformer.config.process != "masked":
            raise ValueError("`reuse_predictions` is for masked models: this one is told the time. Leave it out.")
        names = callback_on_step_end_tensor_inputs or ["sample"]
        if unknown := [name for name in names if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, found {unknown}."
            )

        # 2. What is given
        rows = given_tokens
        if rows is not None and not (prompt is None and suffix is None and max_new_tokens is None):
            raise ValueError("`given_tokens` say all that is given; leave prompt, suffix and max_new_tokens out.")
        if rows is None and (prompt is not None or suffix is not None):
            rows = self.rows_of(prompt, suffix, int(num_texts_per_prompt), max_new_tokens)
        elif rows is None:
            row: list[int | None] = [None] * self.sequence_length
            rows = GivenTokens.of_rows([row[:max_new_tokens]] * int(batch_size), self.sequence_length)
        device = self._execution_device
        token_ids, given, has_given = rows.sequences.to(device), rows.given.to(device), bool(rows.given.any())
        row_generators(generator, len(token_ids))

        # 3. Denoise
        scheduler, callback = self.scheduler, callback_on_step_end
        scheduler.set_timesteps(num_inference_steps, device=device)
        scheduler.set_begin_index(0)
        self.num_timesteps, self.num_function_evaluations, self._interrupt = len(scheduler.timesteps), 0, False
        embeddings = self.transformer.word_embeddings
        sample = scheduler.start(token_ids, self.transformer.config.vocab_size, generator, embeddings)
        seen: Any = None
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                if has_given:
                    sample = scheduler.give(sample, token_ids, given)
                if not (reuse_predictions and seen is not None and torch.equal(seen, sample)):
                    logits = self.transformer(**scheduler.model_inputs(sample, t)).logits
                    self.num_function_evaluations += 1
                seen = sample
                sample = scheduler.step(logits, t, sample, generator=generator, embeddings=embeddings).prev_sample
                if callback is not None:
                    tensors = {name: {"sample": sample, "logits": logits}[name] for name in names}
                    sample = (callback(self, i, t, tensors) or {}).pop("sample", sample)
                progress_bar.update()

        # 4. Texts, with what was given as it was, cut where they end
        words = torch.where(given, token_ids, scheduler.words(sample))
        sequences = cut_rows(words, rows.lengths, self.tokenizer.eos_token_id or 0)
        texts = self.to_texts(sequences) if output_type == "text" else None
        self.maybe_free_model_hooks()
        return LDLMPipelineOutput(sequences=sequences, texts=texts) if return_dict else (sequences, texts)

    def infill(
        self,
        texts: str | list[str],
        gap: str = "___",
        gap_tokens: int = 6,
        num_texts_per_prompt: int = 1,
        **arguments: Any,
    ) -> LDLMPipelineOutput | tuple:
        """Fills the gaps of texts.

        Args:
            texts: a text or a list of them, each with one gap marker or more.
            gap: marks a gap.
            gap_tokens: tokens that are written into each gap.
            num_texts_per_prompt: as of [`~TokenDiffusionPipeline.__call__`].
            arguments: others of it.

        Raises:
            ValueError: a text without a gap, or too long; as of [`~TokenDiffusionPipeline.__call__`].
        """
        rows = rows_with_gaps(self.tokenizer, as_texts("texts", texts), gap, gap_tokens, self.sequence_length)
        given_tokens = GivenTokens.of_rows(rows, self.sequence_length).repeat(num_texts_per_prompt)
        return self(given_tokens=given_tokens, **arguments)

    def to_texts(self, sequences: torch.Tensor) -> list[str]:
        """Texts of token ids (B, T), without special tokens, and without masks that an interrupted call has left."""
        rows = [[token for token in row if token != self.transformer.mask_token_id] for row in sequences.tolist()]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
