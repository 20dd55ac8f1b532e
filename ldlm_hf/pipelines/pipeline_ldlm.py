"""Sampling text from a Latent Diffusion Language Model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from transformers import PreTrainedTokenizerBase

from ..loading.checks import whole_number
from ..loading.lora import LDLMLoraLoaderMixin
from ..models.conditions import Conditions
from ..models.latent_decoder import LDLMLatentDecoder
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_decoder import LDLMTokenDecoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS
from ..schedulers.discrete import is_discrete
from ..schedulers.tangent import alpha_sigma
from .calls import Calls, CallState
from .latent_denoising import LatentDenoisingPipeline
from .pipeline_output import LDLMPipelineOutput
from .prompts import (
    GivenTokens,
    as_texts,
    continued_rows,
    rows_with_gaps,
    tokenize,
    tokenize_suffix,
    whole_characters,
)
from .sampling import Sampling, StepCallback, check_counts, check_number
from .steering import LatentGradient, Particles, Rewards, Steering, check_draws_noise, check_rewards, one_reward


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("text", "seq", "latent", "pt")

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from ldlm_hf import LDLMPipeline

        >>> pipe = LDLMPipeline.from_pretrained("runs/demo/pipeline")
        >>> output = pipe(batch_size=4, num_inference_steps=128, generator=torch.Generator().manual_seed(0))
        >>> print(output.texts[0])
        >>> print(pipe("The state of our union", num_texts_per_prompt=2, num_inference_steps=32).texts)
        ```
"""


class LDLMPipeline(LatentDenoisingPipeline, LDLMLoraLoaderMixin):
    r"""
    Pipeline for text generation with a Latent Diffusion Language Model: denoises latents from pure noise, then decodes
    the clean prediction to tokens once (Section 4.3 of the paper).

    It writes texts, and where the transformer was trained with texts given in part (`role_embeds`), continues prompts
    and fills gaps. With any transformer [`~LDLMPipeline.edit`] changes texts, and [`~LDLMPipeline.steer`] writes those
    that a reward prefers.

    Adapters of the transformer load as in the pipelines of diffusers ([`~LDLMLoraLoaderMixin.load_lora_weights`]).

    Threads may call one pipeline at the same time, unless its weights are offloaded or outputs of its layers cached:
    the hooks that do this know of one call only. `num_timesteps`, `num_function_evaluations` and `interrupt` are those
    of its own call within a callback, and elsewhere those of the call that began last, as are the timesteps of
    `scheduler`.

    Any component may be `None`: what needs it then raises a ValueError that names it, and everything else works. So a
    pipeline without `transformer` and `scheduler` encodes and decodes.

    Args:
        transformer ([`LDLMTransformer1DModel`], *optional*): denoiser of the latents.
        latent_decoder ([`LDLMLatentDecoder`], *optional*):
            Latents → hidden states. `None` where the token decoder reads latents (App. B.2).
        token_decoder ([`LDLMTokenDecoder`], *optional*): hidden states (or latents) → logits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the token decoder's vocabulary.
        scheduler ([`TangentScheduler`], *optional*):
            The noise process, and how it is reversed: any scheduler of the tangent schedule, or one of diffusers' own
            that [`diffusers_config`] has put on it.
        token_encoder ([`LDLMTokenEncoder`], *optional*): needed for prompts, and by [`~LDLMPipeline.encode`].
        latent_encoder ([`LDLMLatentEncoder`], *optional*): the same.
        self_condition_scale (`float`, *optional*):
            What a call without one takes, saved with the pipeline: guidance that suits its denoiser. One without a
            self-condition, such as a distilled student in its place, is not guided.
        guidance_rescale, guidance_scale (`float`, *optional*): the same of those arguments.
        ends_texts (`bool`, defaults to `False`):
            Whether the model was trained on one document a row, so that a text ends at the first end-of-text token
            that is written; saved with the pipeline, as the next one. Texts are cut there, token ids are not.
        source_length (`int`, *optional*):
            Tokens of a source, for a model that was trained to write a target behind it (a translation, a summary): a
            prompt is the source, filled up with end-of-text tokens, and texts are the targets alone.

    Raises:
        ValueError: components whose sizes do not fit each other, or guidance out of its range.
    """

    model_cpu_offload_seq = "token_encoder->latent_encoder->transformer->latent_decoder->token_decoder"
    _optional_components = [
        "transformer",
        "latent_decoder",
        "token_decoder",
        "tokenizer",
        "scheduler",
        "token_encoder",
        "latent_encoder",
    ]
    scheduler_classes = (*SCHEDULERS, *DIFFUSERS_SCHEDULERS)
    guidance_settings = ("self_condition_scale", "guidance_rescale")
    saved_settings = (*guidance_settings, "guidance_scale", "ends_texts", "source_length")

    def __init__(
        self,
        transformer: LDLMTransformer1DModel | None,
        latent_decoder: LDLMLatentDecoder | None,
        token_decoder: LDLMTokenDecoder | None,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: SchedulerMixin | None,
        token_encoder: LDLMTokenEncoder | None = None,
        latent_encoder: LDLMLatentEncoder | None = None,
        self_condition_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_scale: float | None = None,
        ends_texts: bool = False,
        source_length: int | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            latent_decoder=latent_decoder,
            token_decoder=token_decoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            token_encoder=token_encoder,
            latent_encoder=latent_encoder,
        )
        self.check_components()
        self._register_guidance(self_condition_scale, guidance_rescale, guidance_scale)
        self._register_texts(ends_texts, source_length)
        self._calls = Calls()
        self._prompt_tokenizer: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None

    def tokenize_prompts(
        self,
        prompt: str | list[str] | None,
        suffix: str | list[str] | None,
        batch_size: int,
        num_texts_per_prompt: int,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and suffixes of each text; empty ones where there are none.

        Raises:
            ValueError: arguments that do not go together, texts that the tokenizer has no tokens for, or for a
                pipeline with a `source_length` anything but sources that fit.
        """
        source_length = self.config.source_length
        if source_length is not None and (prompt is None or suffix is not None):
            raise ValueError(
                f"This pipeline writes a target for a source of up to {source_length} tokens: give the source as "
                "`prompt`, and no `suffix`."
            )
        if prompt is None and suffix is None:
            if int(num_texts_per_prompt) != 1:
                raise ValueError(
                    f"`num_texts_per_prompt`={num_texts_per_prompt} is for prompts; without one, use batch_size."
                )
            return [[] for _ in range(int(batch_size))], [[] for _ in range(int(batch_size))]
        if int(batch_size) != 1:
            raise ValueError(
                f"`batch_size`={batch_size} is for texts without a prompt; with one, use num_texts_per_prompt."
            )
        self.require_components("a prompt", "tokenizer")
        prompts = as_texts("prompt", "" if prompt is None else prompt)
        suffixes = as_texts("suffix", "" if suffix is None else suffix)
        # one text is that of all
        if prompt is None:
            prompts = prompts * len(suffixes)
        if suffix is None or isinstance(suffix, str):
            suffixes = suffixes * len(prompts)
        if len(prompts) != len(suffixes):
            raise ValueError(
                f"`prompt` has {len(prompts)} texts and `suffix` {len(suffixes)}: give one or more prompts, and one "
                "suffix for all of them or one for each."
            )
        times, tokenizer = range(int(num_texts_per_prompt)), self.prompt_tokenizer
        # a space before a word is often a part of its token, and what is written has its own
        prompt_ids = [tokenize(tokenizer, one.rstrip(" "), "prompt") for one in prompts]
        suffix_ids = [tokenize_suffix(tokenizer, one) for one in suffixes]
        if source_length is not None:
            prompt_ids = [self.fill_source(row, source_length) for row in prompt_ids]
        return [row for row in prompt_ids for _ in times], [row for row in suffix_ids for _ in times]

    def fill_source(self, row: list[int], source_length: int) -> list[int]:
        """A source's tokens, filled up with end-of-text tokens; ValueError for more than there is room for."""
        if len(row) > source_length:
            raise ValueError(
                f"`prompt` has {len(row)} tokens, but a source of this pipeline has room for {source_length} "
                "(source_length). Shorten it."
            )
        return row + [self.fill_token_id or 0] * (source_length - len(row))

    def check_writes_freely(self, caller: str) -> None:
        """Raises ValueError for a pipeline that writes targets of one length for sources."""
        source_length = self.config.source_length
        if source_length is not None:
            raise ValueError(
                f"{caller} is for pipelines that go on with texts. This one writes a target of up to "
                f"{self.sequence_length - source_length} tokens for a source of up to {source_length}: call it with "
                "the source as `prompt`."
            )

    @property
    def prompt_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer, in which a text's special tokens are text: that is a state, which threads share."""
        if self._prompt_tokenizer is None or self._prompt_tokenizer[0] is not self.tokenizer:
            self._prompt_tokenizer = (self.tokenizer, copy.deepcopy(self.tokenizer))
        return self._prompt_tokenizer[1]

    def rows_around(
        self, prompts: list[list[int]], suffixes: list[list[int]], max_new_tokens: int | None
    ) -> GivenTokens | None:
        """Rows of prompts, tokens to be written and suffixes, as of [`continued_rows`]; None for whole texts."""
        if max_new_tokens is None and not any(prompts) and not any(suffixes):
            return None
        length = self.sequence_length
        return GivenTokens.of_rows(continued_rows(prompts, suffixes, length, max_new_tokens), length)

    def encode_given(self, rows: GivenTokens) -> dict[str, torch.Tensor] | None:
        """What the denoiser is told of given tokens (see [`Conditions.of_denoiser`]); None where there are none.

        Raises:
            ValueError: a transformer that was trained without such, or a pipeline without encoders.
        """
        if not rows.given.any():
            return None
        self.check_takes_prompts()
        conditions = Conditions(rows.given).to(self._execution_device)
        latents = self.encode_sequences(rows.sequences, conditions.attention_mask())
        return conditions.of_denoiser(latents.to(self.transformer.dtype))

    def check_takes_prompts(self) -> None:
        """Raises ValueError for a transformer that was trained on whole texts, or a pipeline without encoders."""
        if not self.transformer.config.role_embeds:
            raise ValueError(
                "This pipeline's transformer was trained without texts given in part (role_embeds=False), so it "
                f"continues no prompt, fills no gap and writes no more than {self.sequence_length} tokens. `edit` "
                "works with any pipeline that has its encoders. Training with conditioning.prefix_share=0.25 "
                "conditioning.gaps_share=0.25 gives one that takes prompts, from a run's pipeline, too "
                "(docs/conditioning.md)."
            )
        self.require_components("a prompt", "token_encoder", "latent_encoder")

    def put_back(self, rows: GivenTokens, sequences: torch.Tensor) -> torch.Tensor:
        """Decoded token ids (B, L) with the given ones as they were, cut where their texts end: (B, T)."""
        given, tokens = rows.given.to(sequences.device), rows.sequences.to(sequences.device)
        return self.cut_rows(torch.where(given, tokens, sequences), rows.lengths)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 128,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        self_condition_scale: float | None = None,
        self_condition_decay: float = 0.0,
        guidance_rescale: float | None = None,
        suffix: str | list[str] | None = None,
        num_texts_per_prompt: int = 1,
        max_new_tokens: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        given_tokens: GivenTokens | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> LDLMPipelineOutput | tuple:
        r"""
        Generates texts, or continues prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What texts begin with, for a transformer that was trained with texts given in part (`role_embeds`); or
                the sources, where the pipeline has a `source_length`: a shorter source is filled up with end-of-text
                tokens, which are given as well, and `sequences` have source, filling and target, `texts` the target.
            batch_size (`int`, defaults to 1): number of texts, without a prompt.
            num_inference_steps (`int`, defaults to 128): number of denoising steps, each one evaluation of the
                transformer, and one more for each of self-condition and prompt that guide it.
            timesteps (`list[float]`, *optional*):
                Times to evaluate the transformer at instead of the scheduler's own grid, decreasing from 1; for
                schedulers of the tangent schedule.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise. A list gives each sample its own stream: sample i is then the same alone and in
                any batch.
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`, *optional*):
                Noise to start from.
            self_condition_scale (`float`, *optional*):
                Weight w of the last prediction as the next step's self-condition: 1 carries it over as it is, 0
                leaves it out, and other weights, above 1 beyond what the model says, guide by it (classifier-free
                guidance with the self-condition in the condition's place), which costs a second evaluation of the
                transformer in every step but the first. By default the pipeline's own `self_condition_scale`, or
                where it has none 1, or 0 for a model trained without it.
            self_condition_decay (`float`, defaults to 0.0):
                How fast w goes to 1 as the noise level sigma / alpha grows; 0 keeps it in all steps.
            guidance_rescale (`float`, *optional*):
                How far, from 0 to 1, a guided prediction goes back to the standard deviation that it has without
                guidance (Lin et al., arXiv 2305.08891); without effect where guidance was learned in training. By
                default the pipeline's own, or 0.
            suffix (`str` or `list[str]`, *optional*):
                What texts end with, one for all prompts or one for each: the model writes what is between.
            num_texts_per_prompt (`int`, defaults to 1): texts for each prompt, one behind the other.
            max_new_tokens (`int`, *optional*):
                How many tokens are written; by default as many as the model's texts have room for. More than that are
                written block by block, each with the end of what is there as its prompt (see
                [`~LDLMPipeline.stream`]).
            guidance_scale (`float`, *optional*):
                Weight v of what is given, without effect where nothing is: 1 is the model's own prediction, more of
                it moves the prediction away from that without a prompt (classifier-free guidance), which costs
                another evaluation of the transformer in each step; 0 leaves the prompt out of the denoiser. By
                default the pipeline's own, or 1.
            guidance_interval (pair of `float`, defaults to `(0.0, 1.0)`): times between which `guidance_scale` holds.
            given_tokens ([`GivenTokens`], *optional*): rows of tokens, any of which may be given, instead of prompts.
            output_type (`str`, defaults to `"text"`):
                `"text"`: texts and token ids; `"seq"` or `"pt"`: token ids, as a tensor; `"latent"`: clean latents,
                which [`~LDLMPipeline.decode`] takes.
            return_dict (`bool`, defaults to `True`): whether to return an [`LDLMPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, tensors)`; what it returns under
                `"latents"` and `"clean_latents"` replaces them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Which of `latents` and `clean_latents` the callback is given; `["latents"]` by default.

        Examples:

        Returns:
            [`LDLMPipelineOutput`], or a tuple `(sequences, texts)`, with `output_type="latent"` `(latents,)`.
        """
        # 1. Check components and inputs
        needed = ["transformer", "scheduler"]
        if output_type != "latent":
            needed.append("token_decoder")
        if output_type == "text":
            needed.append("tokenizer")
        self.require_components("generation", *needed)
        check_counts(batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt)
        if max_new_tokens is not None:
            check_counts(max_new_tokens=max_new_tokens)
            max_new_tokens = int(max_new_tokens)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            generator=generator,
            self_condition_scale=self_condition_scale,
            self_condition_decay=self_condition_decay,
            guidance_rescale=guidance_rescale,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 2. What is given, and what is to be written
        rows, is_long = given_tokens, False
        if rows is not None:
            if not (prompt is None and suffix is None and max_new_tokens is None):
                raise ValueError("`given_tokens` say all that is given; leave prompt, suffix and max_new_tokens out.")
            rows.check(self.sequence_length)
            batch_size = len(rows.sequences)
        else:
            prompts, suffixes = self.tokenize_prompts(prompt, suffix, batch_size, num_texts_per_prompt)
            batch_size = len(prompts)
            longest = max(map(len, prompts))
            is_long = max_new_tokens is not None and longest + max_new_tokens > self.sequence_length
            if is_long:
                self.check_writes_freely(f"`max_new_tokens`={max_new_tokens}")
            if is_long and any(suffixes):
                raise ValueError(
                    f"`max_new_tokens`={max_new_tokens} with a `suffix`: texts that end with one are no longer "
                    f"than this model's {self.sequence_length} tokens, prompt and suffix included."
                )
            rows = self.rows_around(prompts, suffixes, None if is_long else max_new_tokens)
        self.check_inputs(batch_size, sampling, latents)

        # 3. Denoise and decode; more tokens than there is room for, block by block
        if is_long:
            if latents is not None or output_type == "latent":
                raise ValueError(
                    f"`max_new_tokens`={max_new_tokens} are more than this model's texts of {self.sequence_length} "
                    "tokens have room for, so there are no latents of the whole: leave `latents` out, and take "
                    "another `output_type`."
                )
            written = [list(one) for one in prompts]
            for block in self._write_blocks(prompts, max_new_tokens or 0, sampling):
                for row, new in zip(written, block, strict=True):
                    row += new
            sequences: torch.Tensor | None = self.pad_rows(written)
            clean_latents = None
        else:
            clean_latents = self._write(rows, batch_size, sampling, CallState(), latents).float()
            sequences = None if output_type == "latent" else self.finished_sequences(rows, clean_latents)
        texts = self._texts_of(rows, sequences) if output_type == "text" and sequences is not None else None
        self.maybe_free_model_hooks()

        if not return_dict:
            return (clean_latents,) if output_type == "latent" else (sequences, texts)
        return LDLMPipelineOutput(sequences=sequences, texts=texts, latents=clean_latents)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        max_new_tokens: int = 256,
        context_tokens: int | None = None,
        batch_size: int = 1,
        num_texts_per_prompt: int = 1,
        **sampling: Any,
    ) -> Iterator[LDLMPipelineOutput]:
        """Writes texts of any length and yields each block as it is done: its token ids (B, T) and texts, which follow
        on those of the blocks before.

        The first block continues the prompt as far as the model's texts go; each further one has the last tokens that
        are there as its prompt.

        Args:
            prompt: as of [`~LDLMPipeline.__call__`].
            max_new_tokens: tokens that are written of each text.
            context_tokens: how many tokens a block is given of those before; half of the model's by default.
            batch_size: number of texts, without a prompt.
            num_texts_per_prompt: as of [`~LDLMPipeline.__call__`].
            sampling: how each block is denoised: the arguments of [`~LDLMPipeline.__call__`] of [`Sampling`]'s names.

        Raises:
            ValueError: as of [`~LDLMPipeline.__call__`], before anything is written.
        """
        self.require_components("generation", "transformer", "scheduler", "token_decoder", "tokenizer")
        self.check_writes_freely("`stream`")
        check_counts(batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt, max_new_tokens=max_new_tokens)
        prompts, _ = self.tokenize_prompts(prompt, None, batch_size, num_texts_per_prompt)
        arguments = Sampling.of("stream", sampling)
        self.check_inputs(len(prompts), arguments)
        given = [len(one) for one in prompts]
        written, shown = prompts, self._to_texts(prompts, given)
        for block in self._write_blocks(prompts, int(max_new_tokens), arguments, context_tokens):
            written = [row + new for row, new in zip(written, block, strict=True)]
            is_last = all(len(row) == len(one) + max_new_tokens for row, one in zip(written, prompts, strict=True))
            texts = [text if is_last else whole_characters(text) for text in self._to_texts(written, given)]
            new_texts = [text[len(before) :] for text, before in zip(texts, shown, strict=True)]
            shown = texts
            yield LDLMPipelineOutput(sequences=self.pad_rows(block), texts=new_texts)
        self.maybe_free_model_hooks()

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
            num_texts_per_prompt: as of [`~LDLMPipeline.__call__`].
            arguments: others of it.

        Raises:
            ValueError: a text without a gap, or too long; as of [`~LDLMPipeline.__call__`].
        """
        self.require_components("infill", "transformer", "tokenizer")
        self.check_writes_freely("`infill`")
        check_counts(gap_tokens=gap_tokens, num_texts_per_prompt=num_texts_per_prompt)
        if not isinstance(gap, str) or not gap:
            raise ValueError(f"`gap` must be a text that marks the gaps, got {gap!r}.")
        rows = rows_with_gaps(
            self.prompt_tokenizer, as_texts("texts", texts), gap, int(gap_tokens), self.sequence_length
        )
        rows = [row for row in rows for _ in range(int(num_texts_per_prompt))]
        return self(given_tokens=GivenTokens.of_rows(rows, self.sequence_length), **arguments)

    @torch.no_grad()
    def edit(
        self,
        texts: str | list[str],
        strength: float = 0.5,
        num_texts_per_prompt: int = 1,
        return_dict: bool = True,
        **sampling: Any,
    ) -> LDLMPipelineOutput | tuple:
        """Rewrites texts, the more freely the greater the strength, token by token; with any transformer.

        Noise is put on the latents of a text up to the time `strength`, and from there they are denoised, with the
        clean latents as the first self-condition (EdiText's recipe).

        Args:
            texts: a text or a list of them.
            strength: time in (0, 1] that is gone back to. Of the steps of a whole grid those are taken that lie below.
            num_texts_per_prompt: versions of each text, one behind the other.
            return_dict: as of [`~LDLMPipeline.__call__`].
            sampling: how latents are denoised: the arguments of [`~LDLMPipeline.__call__`] of [`Sampling`]'s names.

        Raises:
            ValueError: a pipeline without encoders, texts that do not fit the model, or a strength out of range.
        """
        self.require_components(
            "edit", "transformer", "scheduler", "token_decoder", "tokenizer", "token_encoder", "latent_encoder"
        )
        self.check_writes_freely("`edit`")
        check_counts(num_texts_per_prompt=num_texts_per_prompt)
        check_number("strength", strength, highest=1, above_zero=True)
        arguments = Sampling.of("edit", sampling)
        versions = int(num_texts_per_prompt)
        rows = [tokenize(self.prompt_tokenizer, text, "texts") for text in as_texts("texts", texts)]
        latents = self.encode_sequences(self.fill_rows(rows)).repeat_interleave(versions, dim=0)
        lengths = [len(row) for row in rows for _ in range(versions)]
        self.check_inputs(len(latents), arguments)
        solver = self.prepare_solver(int(arguments.num_inference_steps), arguments.timesteps, latents.device)
        if is_discrete(self.scheduler):
            raise ValueError(
                f"{type(self.scheduler).__name__} counts discrete levels, from the first of which it starts; to edit, "
                "use a scheduler of the tangent schedule."
            )
        times = [time for time in solver.times.cpu().tolist() if time <= strength]
        if not times:
            raise ValueError(
                f"`strength`={strength} is below all times of the grid, the last of which is "
                f"{float(solver.times[-1]):.3f}: raise `strength`, or take more steps, which end nearer to t_min="
                f"{self.scheduler.config.t_min}."
            )
        noise = self.prepare_latents(len(latents), latents.device, arguments.generator)
        alpha, sigma = alpha_sigma(torch.tensor(times[0]), self.scheduler.config.tangent_d)
        noisy_latents = float(alpha) * latents + float(sigma) * noise
        arguments = replace(arguments, timesteps=times, guidance_scale=1.0)
        estimate = latents if self.scale_or_own(arguments.self_condition_scale) else None
        clean_latents = self.denoise(noisy_latents, arguments, CallState(), self_condition=estimate)
        # as many tokens as there were; what follows them is no text
        sequences = self.cut_rows(self.decode_to_sequences(clean_latents), lengths)
        output = LDLMPipelineOutput(
            sequences=sequences, texts=self._to_texts(sequences), latents=clean_latents.float()
        )
        self.maybe_free_model_hooks()
        return output if return_dict else (output.sequences, output.texts)

    @torch.no_grad()
    def steer(
        self,
        reward: Callable[[list[str]], Rewards] | None = None,
        token_reward: Callable[[torch.Tensor], Rewards] | None = None,
        latent_reward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        scale: float = 1.0,
        num_particles: int = 16,
        reward_every: int = 1,
        prompt: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        batch_size: int = 1,
        num_texts_per_prompt: int = 1,
        max_new_tokens: int | None = None,
        return_dict: bool = True,
        **sampling: Any,
    ) -> LDLMPipelineOutput | tuple:
        """Writes texts that a reward r prefers, from p(z) exp(lambda r(z)) with p what the pipeline writes otherwise;
        with any transformer, without training.

        A reward of texts or token ids steers by particles ([`Particles`]). `num_particles` are denoised for each text,
        and decoded and rewarded at each step. The text is drawn from the last ones by their weights: with `scale` 0 it
        is any of them, with a very large one the best. It needs a stochastic scheduler of this package. A reward of
        latents steers by its gradient ([`LatentGradient`]), which costs no evaluation more, with any scheduler.

        Args:
            reward: list of B texts → B numbers, a sequence or a tensor; the more, the better.
            token_reward: the same of token ids (B, T).
            latent_reward: clean latents (B, N, d_z), float32, as [`~LDLMPipeline.encode`] gives them → tensor (B,)
                that can be differentiated.
            scale: lambda, not negative.
            num_particles: of each text, 2 or more; without effect on a reward of latents.
            reward_every: steps from one reward of the particles to the next; the last step has one in any case.
            prompt, suffix, batch_size, num_texts_per_prompt: as of [`~LDLMPipeline.__call__`].
            max_new_tokens: the same, within the model's length.
            return_dict: as of [`~LDLMPipeline.__call__`].
            sampling: how latents are denoised: the arguments of [`~LDLMPipeline.__call__`] of [`Sampling`]'s names.
                Resampling draws from `generator`, too. A list has one for each text, which all of its particles draw
                from: text i is then the same alone and in any batch. Callbacks see all particles, those of a text
                one behind the other.

        Returns:
            [`LDLMPipelineOutput`] with the texts and their `rewards`, or a tuple `(sequences, texts)`.

        Raises:
            ValueError: no reward or several, one that does not return a finite number for each text, particles with
                a deterministic scheduler; as of [`~LDLMPipeline.__call__`].
        """
        self.require_components("steer", "transformer", "scheduler", "token_decoder", "tokenizer")
        name, function = one_reward(reward=reward, token_reward=token_reward, latent_reward=latent_reward)
        check_number("scale", scale)
        check_counts(
            num_particles=num_particles,
            reward_every=reward_every,
            batch_size=batch_size,
            num_texts_per_prompt=num_texts_per_prompt,
        )
        if int(num_particles) < 2:
            raise ValueError(f"`num_particles`={num_particles}: there is nothing to choose from; take 2 or more.")
        prompts, suffixes = self.tokenize_prompts(prompt, suffix, batch_size, num_texts_per_prompt)
        if max_new_tokens is not None:
            check_counts(max_new_tokens=max_new_tokens)
            max_new_tokens = int(max_new_tokens)
            if max(map(len, prompts)) + max_new_tokens > self.sequence_length:
                raise ValueError(
                    f"`max_new_tokens`={max_new_tokens}: steered texts have no more than this model's "
                    f"{self.sequence_length} tokens, the prompt included."
                )
        rows = self.rows_around(prompts, suffixes, max_new_tokens)
        arguments = Sampling.of("steer", sampling)
        self.check_inputs(len(prompts), arguments)

        rewards_of = partial(self._rewards_of, name, function)
        if name == "latent_reward":
            given = rows.given if rows is not None and rows.given.any() else None
            gradient = LatentGradient(function, float(scale), given)
            clean_latents = self._write(rows, len(prompts), arguments, CallState(), steering=gradient)
        else:
            copies, generator = int(num_particles), arguments.generator
            check_draws_noise(
                self.prepare_solver(int(arguments.num_inference_steps), arguments.timesteps, self._execution_device)
            )
            particle_rows = None if rows is None else rows.repeat(copies)
            particles = Particles(
                partial(rewards_of, particle_rows), len(prompts), copies, float(scale), int(reward_every), generator
            )
            if isinstance(generator, list):
                arguments = replace(arguments, generator=[one for one in generator for _ in range(copies)])
            clean_latents = particles.draw(
                self._write(particle_rows, len(prompts) * copies, arguments, CallState(), steering=particles)
            )
        sequences = self.finished_sequences(rows, clean_latents)
        output = LDLMPipelineOutput(
            sequences=sequences,
            texts=self._texts_of(rows, sequences),
            latents=clean_latents.float(),
            rewards=rewards_of(rows, clean_latents).detach(),
        )
        self.maybe_free_model_hooks()
        return output if return_dict else (output.sequences, output.texts)

    def _rewards_of(
        self, name: str, reward: Callable[[Any], Rewards], rows: GivenTokens | None, clean_latents: torch.Tensor
    ) -> torch.Tensor:
        """Rewards (B,) of clean latents (B, N, d_z), by what a reward of that name is one of."""
        if name == "latent_reward":
            return check_rewards(name, reward(clean_latents.float()), len(clean_latents))
        sequences = self.finished_sequences(rows, clean_latents)
        found = reward(sequences) if name == "token_reward" else reward(self._texts_of(rows, sequences))
        return check_rewards(name, found, len(clean_latents))

    def _write_blocks(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        context_tokens: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each text, block by block, `max_new_tokens` in all."""
        length = self.sequence_length
        context = length // 2 if context_tokens is None else whole_number(context_tokens)
        if context is None or not 0 < context < length:
            raise ValueError(f"`context_tokens` must be an integer from 1 to {length - 1}, got {context_tokens!r}.")
        if any(prompts) or max_new_tokens > length:
            self.check_takes_prompts()
        call = CallState()
        contexts, left = [list(one) for one in prompts], [max_new_tokens] * len(prompts)
        while any(left) and not call.interrupt:
            # a text that is complete is written on with the others, and thrown away
            rows = GivenTokens.of_rows(continued_rows(contexts, [[]] * len(prompts), length, None), length)
            clean_latents = self._write(rows, len(prompts), sampling, call)
            sequences = self.finished_sequences(rows, clean_latents).tolist()
            block = [row[len(before) :][:count] for row, before, count in zip(sequences, contexts, left, strict=True)]
            left = [0 if self.is_over(new) else count - len(new) for count, new in zip(left, block, strict=True)]
            contexts = [row[-context:] for row in sequences]
            yield block

    def _write(
        self,
        rows: GivenTokens | None,
        batch_size: int,
        sampling: Sampling,
        call: CallState,
        noise: torch.Tensor | None = None,
        steering: Steering | None = None,
    ) -> torch.Tensor:
        """Clean latents (B, N, d_z) of texts, around what is given of them."""
        given = None if rows is None else self.encode_given(rows)
        if given is None:
            # nothing to be guided by
            sampling = replace(sampling, guidance_scale=1.0)
        elif sampling.guidance_scale is None:
            sampling = replace(sampling, guidance_scale=self.config.guidance_scale)
        latents = self.prepare_latents(batch_size, self._execution_device, sampling.generator, noise)
        return self.denoise(latents, sampling, call, given, steering=steering)

    def _texts_of(self, rows: GivenTokens | None, sequences: torch.Tensor) -> list[str]:
        """The texts of token ids (B, T), around what was given of them."""
        return self._to_texts(sequences, None if rows is None else rows.ends_of_given)

    def finished_sequences(self, rows: GivenTokens | None, clean_latents: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) of clean latents, decoded without decoder noise."""
        sequences = self.decode_to_sequences(clean_latents)
        return sequences if rows is None else self.put_back(rows, sequences)
