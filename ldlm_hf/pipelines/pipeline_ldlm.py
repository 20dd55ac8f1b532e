"""Sampling text from a Latent Diffusion Language Model."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import os
import reprlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from ..loading.checks import whole_number
from ..loading.repository import (
    check_saveable,
    keep_card,
    superseded_weights,
    upload_repository,
    write_repository_code,
)
from ..loading.safe_loading import check_model_index, check_serialization
from ..models.latent_decoder import LDLMLatentDecoder
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_decoder import LDLMTokenDecoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS
from ..schedulers.discrete import check_schedule, is_discrete, model_times
from ..schedulers.tangent import alpha_sigma
from .pipeline_output import LDLMPipelineOutput


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("text", "seq", "latent", "pt")
# one for all pipelines, since several may share a scheduler, as those do that `from_pipe` makes
SCHEDULER_LOCK = threading.Lock()

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from ldlm_hf import LDLMPipeline

        >>> pipe = LDLMPipeline.from_pretrained("runs/demo/pipeline")
        >>> output = pipe(batch_size=4, num_inference_steps=128, generator=torch.Generator().manual_seed(0))
        >>> print(output.texts[0])
        ```
"""


@dataclass
class CallState:
    """What one call of a pipeline has reached; see the pipeline's properties of these names."""

    num_timesteps: int = 0
    num_function_evaluations: int = 0
    interrupt: bool = False


class LDLMPipeline(DiffusionPipeline):
    r"""
    Pipeline for unconditional text generation with a Latent Diffusion Language Model: denoises latents from pure
    noise, then decodes the clean prediction to tokens once (Section 4.3 of the paper).

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
        token_encoder ([`LDLMTokenEncoder`], *optional*): needed by [`~LDLMPipeline.encode`] only.
        latent_encoder ([`LDLMLatentEncoder`], *optional*): needed by [`~LDLMPipeline.encode`] only.

    Raises:
        ValueError: components whose sizes do not fit each other.
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
        self._last_call = CallState()
        self._running_calls: dict[int, CallState] = {}  # by thread

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        check_model_index(cls, config_dict)
        return super().extract_init_dict(config_dict, **kwargs)

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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as [`~diffusers.DiffusionPipeline.save_pretrained`] does, and makes the folder a repository that loads
        with `trust_remote_code=True` where `ldlm_hf` is not installed: with its code, and with the model card of the
        folder that the pipeline was loaded from, unless it has a card already.

        Weights of the same variant that the folder, or the repository, holds already are replaced, whether they are
        one file or several; those of other variants stay.

        Args:
            push_to_hub: upload the folder, as it is then.
            kwargs: `repo_id` (the folder's name by default), `commit_message`, `private`, `token`, `revision` and
                `create_pr` of the upload, as in [`~LDLMPipeline.push_to_hub`].

        Raises:
            ValueError: what could not be loaded again: `safe_serialization=False`, `use_flashpack=True`, a variant
                with other signs than letters, digits, - and _, a component with adapters of peft, or one of another
                class than those that the constructor names.
        """
        check_serialization(safe_serialization, use_flashpack, variant)
        check_saveable(self)
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        write_repository_code(self, save_directory)
        keep_card(save_directory, self.config.get("_name_or_path"))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            stale = superseded_weights(self.components, variant)
            upload_repository(save_directory, repo_id, delete_patterns=stale, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Uploads the pipeline to the Hub, with its code and its model card, in place of weights of the same variant
        that the repository holds already.

        Args:
            repo_id: "organisation/name", or a name in one's own namespace; created if it does not exist.
            commit_message: "Upload pipeline" by default.
            private: whether a new repository is private; `None` is the organisation's default.
            token: of the Hub; `None` is the stored one.
            create_pr: open a pull request instead of committing.
            safe_serialization: only `True`, safetensors, since pickles are never loaded.
            variant: part of the weights' file names, such as `"fp16"` for a pipeline in half precision.
            max_shard_size: largest file of weights, such as `"5GB"`.
            revision: branch to commit to; created if it does not exist.

        Returns:
            The commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return upload_repository(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=superseded_weights(self.components, variant),
            )

    @property
    def _call_state(self) -> CallState:
        """Of the call that this thread is in, otherwise of the one that began last."""
        return self._running_calls.get(threading.get_ident(), self._last_call)

    @contextmanager
    def _running(self, call: CallState) -> Iterator[None]:
        """Makes a call the one that this thread is in; a callback may call the pipeline again."""
        thread = threading.get_ident()
        outer = self._running_calls.get(thread)
        self._running_calls[thread] = self._last_call = call
        try:
            yield
        finally:
            if outer is None:
                del self._running_calls[thread]
            else:
                self._running_calls[thread] = outer

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the running or last call."""
        return self._call_state.num_timesteps

    @property
    def num_function_evaluations(self) -> int:
        """How often the transformer has seen each sample in the running or last call (NFE)."""
        return self._call_state.num_function_evaluations

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback asks for that with `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call_state.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._call_state.interrupt = value

    def check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
        self_condition_scale: float | None = None,
        self_condition_decay: float = 0.0,
    ) -> None:
        """Raises ValueError, naming argument, value and remedy, for everything that `__call__` cannot work with."""
        if isinstance(batch_size, (str, list, tuple)):
            raise ValueError(
                f"`batch_size`={reprlib.repr(batch_size)}: generation takes no text, it is unconditional; the first "
                "argument is the number of texts to write, such as pipe(4). `encode` and `decode` take and give texts."
            )
        for name, value in (("batch_size", batch_size), ("num_inference_steps", num_inference_steps)):
            whole = whole_number(value)
            if whole is None or whole < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name, number in (
            ("self_condition_scale", 1.0 if self_condition_scale is None else self_condition_scale),
            ("self_condition_decay", self_condition_decay),
        ):
            if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 <= number < math.inf:
                raise ValueError(f"`{name}` must be a finite number that is not negative, got {number!r}.")
        if self_condition_scale and not self.transformer.config.self_conditioning:
            raise ValueError(
                f"`self_condition_scale`={self_condition_scale}: this transformer was trained without a "
                "self-condition; leave it out."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        generators = generator if isinstance(generator, list) else [generator]
        if not all(one is None or isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}; give one generator, or "
                "one for each sample."
            )
        if latents is not None:
            expected = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, sample_size, "
                    f"in_channels) = {expected}."
                )
            if not latents.is_floating_point():
                raise ValueError(f"`latents` must be floating-point noise, got {latents.dtype}.")
        unknown = [
            name for name in callback_on_step_end_tensor_inputs or [] if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{unknown}."
            )

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

    def prepare_scheduler(
        self, num_inference_steps: int, timesteps: list[float] | None, device: torch.device
    ) -> SchedulerMixin:
        """A copy of the scheduler at the start of a call's grid, for this call's steps alone.

        The pipeline's own scheduler is given the grid too, for those who read its timesteps, but takes no step.
        """
        with SCHEDULER_LOCK:
            if timesteps is None:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
            else:
                self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            scheduler = copy.deepcopy(self.scheduler)
        if hasattr(scheduler, "set_begin_index"):
            # or else the scheduler reads the first time back from the device to look it up
            scheduler.set_begin_index(0)
        return scheduler

    def prepare_step_arguments(
        self, generator: torch.Generator | list[torch.Generator] | None
    ) -> dict[str, torch.Generator | list[torch.Generator] | None]:
        """What the scheduler's step takes beside prediction, time and sample: not all have noise to draw."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def self_condition_weights(self, times: torch.Tensor, scale: float, decay: float) -> list[float]:
        """Weights w of the self-condition, one a step: w = 1 + (scale - 1) exp(-decay sigma / alpha).

        With a decay the weight is 1, plain carry-over, where there is mostly noise, and goes to `scale` as it clears.

        Args:
            times: those of the steps, in [0, 1].
            scale: w without noise.
            decay: how fast w - 1 falls as the noise level sigma / alpha grows.
        """
        if decay == 0 or scale == 1:
            return [float(scale)] * len(times)
        alpha, sigma = alpha_sigma(times.cpu(), self.scheduler.config.tangent_d)
        return [1 + (scale - 1) * math.exp(-decay * level) for level in (sigma / alpha).tolist()]

    def next_times(self, scheduler: SchedulerMixin) -> torch.Tensor | None:
        """Where each step goes, for a flow map with its scheduler; None for a denoiser of one time."""
        if not hasattr(scheduler, "next_timesteps"):
            return None
        if not self.transformer.config.next_timestep_conditioning:
            raise ValueError(
                f"{type(scheduler).__name__} takes steps of a flow map, which this transformer is not "
                "(next_timestep_conditioning=False). Distil it by training/distill.py, or use another scheduler."
            )
        return scheduler.next_timesteps

    def predict_clean_latents(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        self_condition: torch.Tensor,
        weight: float,
        **conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        """The denoiser's prediction (B, N, d_z), guided by its self-condition: x^ = x^_0 + w (x^_sc - x^_0).

        x^_sc is the prediction from the self-condition, x^_0 that without one. For w = 1 and w = 0 one of them is all
        that counts, and the transformer sees the batch once; for other weights twice.

        Args:
            latents: noisy latents (B, N, d_z).
            time: their time, of shape ().
            self_condition: the last prediction (B, N, d_z).
            weight: w.
            conditions: what else the transformer is told of the step.
        """
        latents, self_condition = latents.to(self.transformer.dtype), self_condition.to(self.transformer.dtype)
        if weight == 1:
            return self.transformer(latents, time, self_condition, **conditions).sample
        nothing = torch.zeros_like(self_condition)
        if weight == 0:
            return self.transformer(latents, time, nothing, **conditions).sample
        both = torch.cat([nothing, self_condition])
        predictions = self.transformer(torch.cat([latents, latents]), time, both, **conditions).sample
        unguided, guided = predictions.float().chunk(2)
        return torch.lerp(unguided, guided, weight)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 128,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        self_condition_scale: float | None = None,
        self_condition_decay: float = 0.0,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> LDLMPipelineOutput | tuple:
        r"""
        Generates texts.

        Args:
            batch_size (`int`, defaults to 1): number of texts.
            num_inference_steps (`int`, defaults to 128): number of denoising steps, each one evaluation of the
                transformer unless the self-condition guides it.
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
                transformer in every step but the first. By default 1, or 0 for a model trained without it.
            self_condition_decay (`float`, defaults to 0.0):
                How fast w goes to 1 as the noise level sigma / alpha grows; 0 keeps it in all steps.
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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check components and inputs
        decoders = {"latent": [], "text": ["token_decoder", "tokenizer"]}.get(output_type, ["token_decoder"])
        self.require_components("generation", "transformer", "scheduler", *decoders)
        self.check_inputs(
            batch_size,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            self_condition_scale,
            self_condition_decay,
        )
        batch_size, num_inference_steps = int(batch_size), int(num_inference_steps)
        check_schedule(self.scheduler)
        if timesteps is not None and is_discrete(self.scheduler):
            raise ValueError(
                f"`timesteps` are times in [0, 1], but {type(self.scheduler).__name__} counts discrete levels; leave "
                "them out, or use a scheduler of the tangent schedule."
            )
        device = self._execution_device

        # 2. Prepare timesteps and latents
        scheduler = self.prepare_scheduler(num_inference_steps, timesteps, device)
        times, next_times = model_times(scheduler), self.next_times(scheduler)
        step_arguments = self.prepare_step_arguments(generator)
        latents = self.prepare_latents(batch_size, device, generator, latents)
        clean_latents = torch.zeros_like(latents)
        if self_condition_scale is None:
            self_condition_scale = 1.0 if self.transformer.config.self_conditioning else 0.0
        weights = self.self_condition_weights(times, self_condition_scale, self_condition_decay)
        # the first step has no prediction to be conditioned on
        weights[0] = 1.0

        # 3. Denoise; the last prediction of the clean latents is the next step's self-condition
        call = CallState(num_timesteps=len(times))
        with self._running(call), self.progress_bar(total=call.num_timesteps) as progress_bar:
            modulations = self.transformer.modulations(times, next_times)
            for i, (t, modulation) in enumerate(zip(scheduler.timesteps, modulations, strict=True)):
                if call.interrupt:
                    continue
                conditions = {"modulation": modulation}
                if next_times is not None:
                    conditions["next_timestep"] = next_times[i]
                model_input = scheduler.scale_model_input(latents, t)
                clean_latents = self.predict_clean_latents(
                    model_input, times[i], clean_latents, weights[i], **conditions
                )  # (B, N, d_z)
                call.num_function_evaluations += 1 if weights[i] in (0, 1) else 2
                latents = scheduler.step(clean_latents, t, latents, **step_arguments).prev_sample

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "clean_latents": clean_latents}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                    clean_latents = callback_outputs.pop("clean_latents", clean_latents)
                progress_bar.update()

        # 4. Decode the clean prediction, without decoder noise
        if output_type == "latent":
            output = LDLMPipelineOutput(latents=clean_latents.float())
        else:
            sequences = self.decode_to_sequences(clean_latents)
            texts = self._to_texts(sequences) if output_type == "text" else None
            output = LDLMPipelineOutput(sequences=sequences, texts=texts)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (output.latents,) if output_type == "latent" else (output.sequences, output.texts)
        return output

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

    def _to_texts(self, sequences: torch.Tensor) -> list[str]:
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
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("`texts` must hold at least one text.")
        return self.encode_sequences(self._tokenize(texts, self.latent_encoder.config.sequence_length))

    @torch.no_grad()
    def encode_sequences(self, sequences: torch.Tensor) -> torch.Tensor:
        """Maps token ids (B, L) to latents (B, N, d_z), float32; L is the model's sequence length.

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
        hidden_states = self.token_encoder(sequences.to(self._execution_device), return_dict=True).hidden_states
        latents = self.latent_encoder(hidden_states.to(self.latent_encoder.dtype), return_dict=True).latents.float()
        self.maybe_free_model_hooks()
        return latents

    @property
    def missing_encoders(self) -> list[str]:
        """Which of the optional components that [`~LDLMPipeline.encode`] needs are not there."""
        return [name for name in ("token_encoder", "latent_encoder") if getattr(self, name) is None]

    def _tokenize(self, texts: list[str], sequence_length: int) -> torch.Tensor:
        """Token ids (B, L), each text filled up with the end-of-text token."""
        fill = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
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
        if latents.ndim != 3 or latents.shape[2] != latent_size or num_latents not in (None, latents.shape[1]):
            raise ValueError(
                f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, num_latents, "
                f"latent_size) = (batch_size, {num_latents or 'num_latents'}, {latent_size})."
            )
        texts = self._to_texts(self.decode_to_sequences(latents.to(self._execution_device)))
        self.maybe_free_model_hooks()
        return texts
