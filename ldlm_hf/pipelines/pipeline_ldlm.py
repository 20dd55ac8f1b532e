"""Sampling text from a Latent Diffusion Language Model."""

from __future__ import annotations

import copy
import math
import numbers
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase

from ..loading.checks import whole_number
from ..loading.repository import RepositoryPipeline
from ..models.conditions import Conditions
from ..models.guidance import guide
from ..models.latent_decoder import LDLMLatentDecoder
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_decoder import LDLMTokenDecoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS
from ..schedulers.discrete import Solver, check_schedule, is_discrete
from ..schedulers.tangent import alpha_sigma
from .calls import Calls, CallState
from .pipeline_output import LDLMPipelineOutput
from .prompts import GivenTokens, continued_rows, rows_with_gaps, tokenize, whole_characters


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("text", "seq", "latent", "pt")
# one for all pipelines, since several may share a scheduler, as those do that `from_pipe` makes
SCHEDULER_LOCK = threading.Lock()

StepCallback: TypeAlias = (
    Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
)

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


@dataclass(frozen=True)
class DenoisingStep:
    """What the denoiser is told of a step, beside the latents.

    Attributes:
        timestep: what the scheduler calls it.
        time: in [0, 1], of shape ().
        self_condition_weight: w of the prediction of the step before.
        guidance_scale: w of what is given.
        guidance_rescale: how far guidance keeps its prediction's standard deviation.
        conditions: further arguments of the transformer.
    """

    timestep: torch.Tensor
    time: torch.Tensor
    self_condition_weight: float
    guidance_scale: float
    guidance_rescale: float
    conditions: dict[str, torch.Tensor | None]

    @property
    def num_function_evaluations(self) -> int:
        """How often the transformer sees each sample."""
        return 1 + (self.self_condition_weight not in (0, 1)) + (self.guidance_scale != 1)


@dataclass
class Sampling:
    """How latents are denoised: the arguments of [`LDLMPipeline.__call__`] of these names."""

    num_inference_steps: int = 128
    timesteps: list[float] | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    self_condition_scale: float | None = None
    self_condition_decay: float = 0.0
    guidance_rescale: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None

    @property
    def callback_tensors(self) -> list[str]:
        """Which tensors the callback is given."""
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            return self.callback_on_step_end.tensor_inputs
        names = self.callback_on_step_end_tensor_inputs
        return ["latents"] if names is None else names


def check_number(name: str, number: Any, highest: float = math.inf) -> None:
    """Raises ValueError unless an argument is a finite number in [0, highest]."""
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (is_number and math.isfinite(number) and 0 <= number <= highest):
        bound = "finite number that is not negative" if highest == math.inf else f"number in [0, {highest:g}]"
        raise ValueError(f"`{name}` must be a {bound}, got {number!r}.")


def as_texts(name: str, texts: Any) -> list[str]:
    """The texts of an argument; ValueError unless it is a text or a list of at least one."""
    is_list = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
    if not (isinstance(texts, str) or is_list):
        raise ValueError(
            f"`{name}` must be a text or a list of at least one text, got {reprlib.repr(texts)}. How many are written "
            "without a prompt says batch_size."
        )
    return [texts] if isinstance(texts, str) else list(texts)


class LDLMPipeline(RepositoryPipeline):
    r"""
    Pipeline for text generation with a Latent Diffusion Language Model: denoises latents from pure noise, then decodes
    the clean prediction to tokens once (Section 4.3 of the paper).

    It writes texts, and where the transformer was trained with texts given in part (`role_embeds`), continues prompts
    and fills gaps. [`~LDLMPipeline.edit`] changes texts with any transformer.

    Threads may call one pipeline at the same time, unless its weights are offloaded: the hooks that move them know of
    one call only. `num_timesteps`, `num_function_evaluations` and `interrupt` are those of its own call within a
    callback, and elsewhere those of the call that began last, as are the timesteps of `scheduler`.

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
        guidance_rescale (`float`, *optional*): the same of that argument.

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
    _callback_tensor_inputs = ["latents", "clean_latents"]
    scheduler_classes = (*SCHEDULERS, *DIFFUSERS_SCHEDULERS)
    saved_settings = ("self_condition_scale", "guidance_rescale")
    max_vocab_padding = 1024  # ours; language models pad theirs by up to 905 (Phi-2)
    max_decoded_positions = 4096  # latents that are decoded at once, or one sample's

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
        self._register_guidance(self_condition_scale, guidance_rescale)
        self._calls = Calls()
        self._prompt_tokenizer: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None

    def check_components(self) -> None:
        """Raises ValueError where tokenizer, decoders and denoiser do not fit each other."""
        if self.token_decoder is None:
            return
        vocab_size = self.token_decoder.config.vocab_size
        # vocabularies of models are often padded to a round number, so the tokenizer may have somewhat fewer tokens
        if self.tokenizer is not None and not vocab_size - self.max_vocab_padding <= len(self.tokenizer) <= vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but the token decoder's vocab_size is {vocab_size}; "
                "use the tokenizer that the token decoder was trained with."
            )
        read_size = self.token_decoder.config.token_hidden_size
        if self.latent_decoder is not None and self.latent_decoder.config.token_hidden_size != read_size:
            raise ValueError(
                f"The latent decoder's token_hidden_size={self.latent_decoder.config.token_hidden_size} differs "
                f"from the token decoder's, {read_size}; a token decoder that reads latents goes with "
                "latent_decoder=None."
            )
        if self.transformer is None:
            return
        num_latents, decoded_size = self.decoded_shape
        if num_latents not in (None, self.transformer.config.sample_size):
            raise ValueError(
                f"The latent decoder's num_latents={num_latents} differs from the transformer's "
                f"sample_size={self.transformer.config.sample_size}."
            )
        channels = self.transformer.config.in_channels
        if decoded_size != channels:
            raise ValueError(
                f"The transformer's in_channels={channels} differs from the {decoded_size} that the decoder reads "
                "(latent decoder latent_size, or token decoder token_hidden_size without a latent decoder)."
            )

    @property
    def sequence_length(self) -> int:
        """Tokens L of a generated text."""
        if self.latent_decoder is None:
            # a token decoder that reads latents has a token for each
            return self.transformer.config.sample_size
        return self.latent_decoder.config.sequence_length

    @property
    def decoded_shape(self) -> tuple[int | None, int]:
        """Number N and width d_z of the latents that are decoded; a token decoder that reads latents itself takes any
        number of them.
        """
        if self.latent_decoder is None:
            return None, self.token_decoder.config.token_hidden_size
        return self.latent_decoder.config.num_latents, self.latent_decoder.config.latent_size

    def require_components(self, caller: str, *names: str) -> None:
        """Raises ValueError, naming them, where components are missing that a method needs."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{caller} needs the components {', '.join(names)}; this pipeline lacks {' and '.join(missing)}. Pass "
                "what is missing to from_pretrained or to the constructor."
            )

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the running or last call."""
        return self._calls.current.num_timesteps

    @property
    def num_function_evaluations(self) -> int:
        """How often the transformer has seen each sample in the running or last call (NFE)."""
        return self._calls.current.num_function_evaluations

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback asks for that with `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._calls.current.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._calls.current.interrupt = value

    def check_counts(self, **counts: int) -> None:
        """Raises ValueError unless each is a positive integer."""
        for name, value in counts.items():
            whole = whole_number(value)
            if whole is None or whole < 1:
                hint = ""
                if name == "batch_size" and isinstance(value, (str, list, tuple)):
                    hint = " A text to be continued goes first: pipe(text) or pipe(prompt=text)."
                raise ValueError(f"`{name}` must be a positive integer, got {reprlib.repr(value)}.{hint}")

    def check_inputs(self, batch_size: int, sampling: Sampling, latents: torch.Tensor | None = None) -> None:
        """Raises ValueError, naming argument, value and remedy, for everything that generation cannot work with."""
        self.check_counts(batch_size=batch_size, num_inference_steps=sampling.num_inference_steps)
        self.check_guidance(sampling.self_condition_scale, sampling.self_condition_decay, sampling.guidance_rescale)
        check_number("guidance_scale", sampling.guidance_scale)
        interval = sampling.guidance_interval
        is_list = isinstance(interval, (list, tuple)) and len(interval) == 2
        is_pair = is_list and all(isinstance(time, numbers.Real) for time in interval)
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"`guidance_interval` must be two times in [0, 1], the lower one first, got {interval}.")
        generator = sampling.generator
        generators = generator if isinstance(generator, list) else [generator]
        if not all(one is None or isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}; give one generator, or "
                "one for each sample."
            )
        if latents is not None:
            if not isinstance(latents, torch.Tensor):
                raise ValueError(f"`latents` must be a tensor of noise, got {reprlib.repr(latents)}.")
            expected = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, sample_size, "
                    f"in_channels) = {expected}."
                )
            if not latents.is_floating_point():
                raise ValueError(f"`latents` must be floating-point noise, got {latents.dtype}.")
        unknown = [name for name in sampling.callback_tensors if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{unknown}."
            )

    def set_guidance(self, self_condition_scale: float | None = None, guidance_rescale: float | None = None) -> None:
        """Makes guidance that of calls without any, which is saved with the pipeline.

        Raises:
            ValueError: some that the denoiser cannot be given.
        """
        if self.transformer is not None:
            self.check_guidance(self_condition_scale, rescale=guidance_rescale)
        self._register_guidance(self_condition_scale, guidance_rescale)

    def _register_guidance(self, self_condition_scale: float | None, guidance_rescale: float | None) -> None:
        check_number("self_condition_scale", self_condition_scale or 0.0)
        check_number("guidance_rescale", guidance_rescale or 0.0, highest=1)
        values = {"self_condition_scale": self_condition_scale, "guidance_rescale": guidance_rescale}
        self.register_to_config(**{name: None if value is None else float(value) for name, value in values.items()})

    def check_guidance(self, scale: float | None, decay: float = 0.0, rescale: float | None = None) -> None:
        """Raises ValueError for guidance by the self-condition that the denoiser cannot be given."""
        check_number("self_condition_scale", scale or 0.0)
        check_number("self_condition_decay", decay)
        check_number("guidance_rescale", rescale or 0.0, highest=1)
        if scale and not self.transformer.config.self_conditioning:
            raise ValueError(
                f"`self_condition_scale`={scale}: this transformer was trained without a self-condition; leave it out."
            )

    def tokenize_prompts(
        self,
        prompt: str | list[str] | None,
        suffix: str | list[str] | None,
        batch_size: int,
        num_texts_per_prompt: int,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and suffixes of each text; empty ones where there are none.

        Raises:
            ValueError: arguments that do not go together, or texts that the tokenizer has no tokens for.
        """
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
        prompt_ids = [tokenize(tokenizer, one, "prompt") for one in prompts]
        suffix_ids = [tokenize(tokenizer, one, "suffix") for one in suffixes]
        return [row for row in prompt_ids for _ in times], [row for row in suffix_ids for _ in times]

    @property
    def prompt_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer, in which a text's special tokens are text: that is a state, which threads share."""
        if self._prompt_tokenizer is None or self._prompt_tokenizer[0] is not self.tokenizer:
            self._prompt_tokenizer = (self.tokenizer, copy.deepcopy(self.tokenizer))
        return self._prompt_tokenizer[1]

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

    def cut_rows(self, sequences: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Token ids (B, L) cut to the rows' own lengths: (B, T), shorter rows filled up with the end-of-text token."""
        longest = max(lengths)
        ends = torch.tensor(lengths, device=sequences.device)[:, None]
        behind = torch.arange(longest, device=sequences.device) >= ends
        return sequences[:, :longest].masked_fill(behind, self.fill_token_id or 0)

    def pad_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids (B, T) of rows, shorter ones filled up with the end-of-text token."""
        longest = max(map(len, rows))
        return torch.tensor([row + [self.fill_token_id or 0] * (longest - len(row)) for row in rows])

    @property
    def fill_token_id(self) -> int | None:
        """What stands behind the end of a text: the end-of-text token, or a separator; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        end = self.tokenizer.eos_token_id
        return self.tokenizer.sep_token_id if end is None else end

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of shape (B, N, d_z) to start from, or the given one; float32 whatever the models' type."""
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise * self.scheduler.init_noise_sigma

    def prepare_solver(self, num_inference_steps: int, timesteps: list[float] | None, device: torch.device) -> Solver:
        """A copy of the scheduler at the beginning of a call's grid, for this call's steps alone.

        The pipeline's own scheduler is given the grid too, for those who read its timesteps, but takes no step.

        Raises:
            ValueError: a scheduler of another noise schedule, explicit times for one that has none, or a flow map's
                scheduler for a transformer that is no flow map.
        """
        name = type(self.scheduler).__name__
        check_schedule(self.scheduler)
        if timesteps is not None and is_discrete(self.scheduler):
            raise ValueError(
                f"`timesteps` are times in [0, 1], but {name} counts discrete levels; leave them out, or use a "
                "scheduler of the tangent schedule."
            )
        with SCHEDULER_LOCK:
            if timesteps is None:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
            else:
                self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            solver = Solver(copy.deepcopy(self.scheduler))
        if solver.next_times is not None and not self.transformer.config.next_timestep_conditioning:
            raise ValueError(
                f"{name} takes steps of a flow map, which this transformer is not (next_timestep_conditioning=False). "
                "Distil it by training/distill.py, or use another scheduler."
            )
        return solver

    def scale_or_own(self, self_condition_scale: float | None) -> float:
        """The scale of a call, or where it names none the pipeline's own, or 1, or 0 for a model trained without a
        self-condition: one that has taken the place of the denoiser that the pipeline's own is for, perhaps."""
        if self_condition_scale is not None:
            return self_condition_scale
        if not self.transformer.config.self_conditioning:
            return 0.0
        own = self.config.self_condition_scale
        return 1.0 if own is None else own

    def self_condition_weights(self, times: torch.Tensor, scale: float | None, decay: float) -> list[float]:
        """Weights w of the self-condition, one a step: w = 1 + (scale - 1) exp(-decay sigma / alpha).

        With a decay the weight is 1, plain carry-over, where there is mostly noise, and goes to `scale` as it clears.
        The first step's is 1: it has no prediction to be conditioned on.

        Args:
            times: those of the steps, in [0, 1].
            scale: w without noise; None as for [`~LDLMPipeline.scale_or_own`].
            decay: how fast w - 1 falls as the noise level sigma / alpha grows.
        """
        scale = self.scale_or_own(scale)
        if decay == 0 or scale == 1:
            weights = [float(scale)] * len(times)
        else:
            alpha, sigma = alpha_sigma(times.cpu(), self.scheduler.config.tangent_d)
            weights = [1 + (scale - 1) * math.exp(-decay * level) for level in (sigma / alpha).tolist()]
        return [1.0, *weights[1:]]

    def denoising_steps(self, solver: Solver, sampling: Sampling) -> Iterator[DenoisingStep]:
        """The steps of a grid; a `guidance_rescale` of None is the pipeline's own, or 0."""
        rescale = sampling.guidance_rescale
        if rescale is None:
            rescale = self.config.guidance_rescale or 0.0
        weights = self.self_condition_weights(
            solver.times, sampling.self_condition_scale, sampling.self_condition_decay
        )
        scales = [1.0] * len(solver.times)
        if sampling.guidance_scale != 1:
            first, last = sampling.guidance_interval
            scales = [sampling.guidance_scale if first <= t <= last else 1.0 for t in solver.times.cpu().tolist()]
        guidance = None
        if self.transformer.config.guidance_embeds:
            # the transformer has learned what guidance gives, and is told how much of it
            guidance = torch.tensor([weight or 1.0 for weight in weights], device=solver.times.device)
            weights = [float(bool(weight)) for weight in weights]
        modulations = self.transformer.modulations(solver.times, solver.next_times, guidance)
        for i, (weight, modulation) in enumerate(zip(weights, modulations, strict=True)):
            conditions = {"modulation": modulation}
            if solver.next_times is not None:
                conditions["next_timestep"] = solver.next_times[i]
            if guidance is not None:
                conditions["guidance"] = guidance[i]
            yield DenoisingStep(solver.timesteps[i], solver.times[i], weight, scales[i], rescale, conditions)

    def predict(
        self,
        latents: torch.Tensor,
        step: DenoisingStep,
        self_condition: torch.Tensor,
        given: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction (B, N, d_z), guided by its self-condition and by what is given:

            x^ = x^_0 + w (x^_sc - x^_0) + (v - 1) (x^_sc - x^_null)

        x^_sc is the prediction from the self-condition, x^_0 that without one, and x^_null that without what is given.
        For w = 1 and w = 0, and for v = 1, one of each two is all that counts, and the transformer is not asked for
        the other.

        Args:
            latents: noisy latents (B, N, d_z).
            step: their time, w, v, and what else the transformer is told.
            self_condition: the last prediction (B, N, d_z).
            given: what is given, as [`Conditions.of_denoiser`] says it.
        """
        given = given or {}
        latents, self_condition = latents.to(self.transformer.dtype), self_condition.to(self.transformer.dtype)
        nothing = torch.zeros_like(self_condition)
        condition = nothing if step.self_condition_weight == 0 else self_condition
        if step.num_function_evaluations == 1:
            return self.transformer(latents, step.time, condition, **step.conditions, **given).sample
        # the predictions that are asked for, each by its self-condition and by what it is told of given latents
        asked = [(condition, given)]
        if step.self_condition_weight not in (0, 1):
            asked.insert(0, (nothing, given))
        if step.guidance_scale != 1:
            asked.append((condition, given | {"given_latents": nothing}))
        told = {name: torch.cat([arguments[name] for _, arguments in asked]) for name in given}
        conditions = torch.cat([one for one, _ in asked])
        latents = torch.cat([latents] * len(asked))
        predictions = self.transformer(latents, step.time, conditions, **step.conditions, **told).sample
        parts = list(predictions.chunk(len(asked)))
        contrast = None
        if step.guidance_scale != 1:
            without = parts.pop().float()
            contrast = (step.guidance_scale - 1) * (parts[-1].float() - without)
            # what is given is as large as before, for the scale that is kept
            contrast = contrast.masked_fill(given["given"][..., None], 0)
        guided = guide(parts[0], parts[-1], step.self_condition_weight, step.guidance_rescale, contrast)
        if not given:
            return guided
        return torch.where(given["given"][..., None], given["given_latents"].to(guided.dtype), guided)

    def denoise(
        self,
        latents: torch.Tensor,
        sampling: Sampling,
        call: CallState,
        given: dict[str, torch.Tensor] | None = None,
        self_condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noisy latents at the beginning of a grid → clean ones, (B, N, d_z).

        Args:
            latents: at the grid's first time.
            sampling: how.
            call: the call that this is part of; counts steps and evaluations.
            given: what is given, as [`Conditions.of_denoiser`] says it.
            self_condition: the first one, zeros by default.
        """
        solver = self.prepare_solver(int(sampling.num_inference_steps), sampling.timesteps, latents.device)
        # the last prediction of the clean latents is the next step's self-condition
        clean_latents = torch.zeros_like(latents) if self_condition is None else self_condition
        steps = self.denoising_steps(solver, sampling)
        call.num_timesteps = len(solver.times)
        with self._calls.running(call), self.progress_bar(total=call.num_timesteps) as progress_bar:
            for i, step in enumerate(steps):
                if call.interrupt:
                    continue
                model_input = solver.model_input(latents, step.timestep)
                clean_latents = self.predict(model_input, step, clean_latents, given)  # (B, N, d_z)
                latents = solver.step(clean_latents, step.timestep, latents, sampling.generator)
                call.num_function_evaluations += step.num_function_evaluations

                if sampling.callback_on_step_end is not None:
                    tensors = {"latents": latents, "clean_latents": clean_latents}
                    callback_kwargs = {name: tensors[name] for name in sampling.callback_tensors}
                    callback_outputs = sampling.callback_on_step_end(self, i, step.timestep, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                    clean_latents = callback_outputs.pop("clean_latents", clean_latents)
                progress_bar.update()
        return clean_latents

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
        guidance_scale: float = 1.0,
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
                What texts begin with, for a transformer that was trained with texts given in part (`role_embeds`).
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
            guidance_scale (`float`, defaults to 1.0):
                Weight v of what is given, without effect where nothing is: 1 is the model's own prediction, more of
                it moves the prediction away from that without a prompt (classifier-free guidance), which costs
                another evaluation of the transformer in each step; 0 leaves the prompt out of the denoiser.
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
        self.check_counts(batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt)
        if max_new_tokens is not None:
            self.check_counts(max_new_tokens=max_new_tokens)
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
            batch_size = len(rows.sequences)
        else:
            prompts, suffixes = self.tokenize_prompts(prompt, suffix, batch_size, num_texts_per_prompt)
            batch_size = len(prompts)
            longest = max(map(len, prompts))
            is_long = max_new_tokens is not None and longest + max_new_tokens > self.sequence_length
            if max_new_tokens is not None or any(prompts) or any(suffixes):
                if is_long and any(suffixes):
                    raise ValueError(
                        f"`max_new_tokens`={max_new_tokens} with a `suffix`: texts that end with one are no longer "
                        f"than this model's {self.sequence_length} tokens, prompt and suffix included."
                    )
                within = None if is_long else max_new_tokens
                rows = GivenTokens.of_rows(
                    continued_rows(prompts, suffixes, self.sequence_length, within), self.sequence_length
                )
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
            output = LDLMPipelineOutput(sequences=self.pad_rows(written))
        else:
            clean_latents = self._write(rows, batch_size, sampling, CallState(), latents)
            output = LDLMPipelineOutput(latents=clean_latents.float())
            if output_type != "latent":
                output.sequences = self.finished_sequences(rows, clean_latents)
        if output_type == "text" and output.sequences is not None:
            output.texts = self._to_texts(output.sequences)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (output.latents,) if output_type == "latent" else (output.sequences, output.texts)
        return output

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
        self.check_counts(
            batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt, max_new_tokens=max_new_tokens
        )
        prompts, _ = self.tokenize_prompts(prompt, None, batch_size, num_texts_per_prompt)
        arguments = Sampling(**sampling)
        self.check_inputs(len(prompts), arguments)
        written, shown = prompts, self._to_texts(prompts)
        for block in self._write_blocks(prompts, int(max_new_tokens), arguments, context_tokens):
            written = [row + new for row, new in zip(written, block, strict=True)]
            is_last = all(len(row) == len(one) + max_new_tokens for row, one in zip(written, prompts, strict=True))
            texts = [text if is_last else whole_characters(text) for text in self._to_texts(written)]
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
        self.check_counts(gap_tokens=gap_tokens, num_texts_per_prompt=num_texts_per_prompt)
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
        self.check_counts(num_texts_per_prompt=num_texts_per_prompt)
        check_number("strength", strength, highest=1)
        arguments = Sampling(**sampling)
        texts, versions = as_texts("texts", texts), int(num_texts_per_prompt)
        latents = self.encode(texts).repeat_interleave(versions, dim=0)
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
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
                f"{float(solver.times[-1]):.3f}: raise it, or num_inference_steps."
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
            left = [count - len(new) for count, new in zip(left, block, strict=True)]
            contexts = [row[-context:] for row in sequences]
            yield block

    def _write(
        self,
        rows: GivenTokens | None,
        batch_size: int,
        sampling: Sampling,
        call: CallState,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clean latents (B, N, d_z) of texts, around what is given of them."""
        given = None if rows is None else self.encode_given(rows)
        if given is None:
            # nothing to be guided by
            sampling = replace(sampling, guidance_scale=1.0)
        latents = self.prepare_latents(batch_size, self._execution_device, sampling.generator, noise)
        return self.denoise(latents, sampling, call, given)

    def finished_sequences(self, rows: GivenTokens | None, clean_latents: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) of clean latents, decoded without decoder noise."""
        sequences = self.decode_to_sequences(clean_latents)
        return sequences if rows is None else self.put_back(rows, sequences)

    @torch.no_grad()
    def decode_to_sequences(self, latents: torch.Tensor) -> torch.Tensor:
        """Maps clean latents (B, N, d_z) to their most likely token ids (B, L); for use in callbacks, too."""
        self.require_components("decoding", "token_decoder")
        # a large batch in parts: the decoders' layers would need more memory for all of it than the denoiser's do
        parts = latents.split(max(1, self.max_decoded_positions // latents.shape[1]))
        return torch.cat([self._decode_part_to_sequences(part) for part in parts])

    def _decode_part_to_sequences(self, latents: torch.Tensor) -> torch.Tensor:
        if self.latent_decoder is None:
            hidden_states = latents
        else:
            latents = latents.to(self.latent_decoder.dtype)
            hidden_states = self.latent_decoder(latents, return_dict=True).hidden_states  # (B, L, D)
        return self.token_decoder.most_likely_tokens(hidden_states.to(self.token_decoder.dtype))

    def _to_texts(self, sequences: torch.Tensor | list[list[int]]) -> list[str]:
        """Token ids (B, L) → texts, without special tokens."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)

    @torch.no_grad()
    def encode(self, texts: str | list[str]) -> torch.Tensor:
        """Maps texts to latents (B, N, d_z), float32.

        The models know full sequences only: a text that is shorter than the model's sequence length is followed by
        end-of-text tokens, as documents are in training.

        Args:
            texts: a text, or a list of them.

        Raises:
            ValueError: a pipeline without encoders or tokenizer, no text, or a text longer than the model's sequence
                length.
        """
        self.require_components("encode", "tokenizer", "token_encoder", "latent_encoder")
        texts = as_texts("texts", texts)
        return self.encode_sequences(self._tokenize(texts, self.latent_encoder.config.sequence_length))

    @torch.no_grad()
    def encode_sequences(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps token ids (B, L) to latents (B, N, d_z), float32; L is the model's sequence length.

        A mask (B, L, L) says which tokens each of them may attend to.

        Raises:
            ValueError: a pipeline without encoders, or token ids of another shape.
        """
        self.require_components("encode_sequences", "token_encoder", "latent_encoder")
        length = self.latent_encoder.config.sequence_length
        if sequences.ndim != 2 or sequences.shape[1] != length:
            raise ValueError(
                f"`sequences` of shape {tuple(sequences.shape)} must have the shape (batch_size, sequence_length) = "
                f"(batch_size, {length})."
            )
        sequences = sequences.to(self._execution_device)
        encoded = self.token_encoder(sequences, attention_mask=attention_mask, return_dict=True)
        hidden_states = encoded.hidden_states.to(self.latent_encoder.dtype)
        latents = self.latent_encoder(hidden_states, attention_mask=attention_mask, return_dict=True).latents.float()
        self.maybe_free_model_hooks()
        return latents

    @property
    def missing_encoders(self) -> list[str]:
        """Which of the optional components that [`~LDLMPipeline.encode`] needs are not there."""
        return [name for name in ("token_encoder", "latent_encoder") if getattr(self, name) is None]

    def _tokenize(self, texts: list[str], sequence_length: int) -> torch.Tensor:
        """Token ids (B, L), each text filled up with the end-of-text token."""
        fill = self.fill_token_id
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for i, row in enumerate(rows):
            if len(row) > sequence_length:
                raise ValueError(
                    f"`texts[{i}]` has {len(row)} tokens, more than the model's sequence_length of {sequence_length}; "
                    "shorten it."
                )
            if len(row) < sequence_length and fill is None:
                raise ValueError(
                    f"`texts[{i}]` has {len(row)} tokens, fewer than the model's sequence_length of "
                    f"{sequence_length}, and the tokenizer has neither an end-of-text nor a separator token to fill "
                    "it up with."
                )
        return torch.tensor([row + [fill] * (sequence_length - len(row)) for row in rows], dtype=torch.long)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[str]:
        """Maps clean latents (B, N, d_z) to texts; the inverse of [`~LDLMPipeline.encode`] as far as it was learned.

        Raises:
            ValueError: latents whose shape is not the model's, or a pipeline without token decoder or tokenizer.
        """
        self.require_components("decode", "token_decoder", "tokenizer")
        num_latents, latent_size = self.decoded_shape
        if num_latents is None and self.transformer is not None:
            num_latents = self.transformer.config.sample_size
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"`latents` must be a tensor, as `encode` returns it, got {reprlib.repr(latents)}.")
        if latents.ndim != 3 or latents.shape[2] != latent_size or num_latents not in (None, latents.shape[1]):
            raise ValueError(
                f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, num_latents, "
                f"latent_size) = (batch_size, {num_latents or 'num_latents'}, {latent_size})."
            )
        texts = self._to_texts(self.decode_to_sequences(latents.to(self._execution_device)))
        self.maybe_free_model_hooks()
        return texts
