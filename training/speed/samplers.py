"""A step of LDLM, of each method of `ldlm_hf/baselines` and of the autoregressive model, as their pipelines take it.

Networks have random weights. Samplers have the settings of their papers, which are their defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ldlm_hf import (
    AutoregressivePipeline,
    CANDIScheduler,
    DuoScheduler,
    FLMScheduler,
    FMLMScheduler,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    MDLMScheduler,
    PsiScheduler,
    ReMDMScheduler,
    TokenDiffusionTransformer,
)
from ldlm_hf.baselines.flow_language_model import FLMCapSettings
from ldlm_hf.baselines.token_scheduler import TokenScheduler
from speed.workloads import (
    DTYPES,
    Case,
    Geometry,
    Workload,
    build_tokenizer,
    randomize_zero_weights,
    sampling_workloads,
)


@dataclass
class Sampler(Workload):
    """A way of sampling; `run` takes one step.

    Attributes:
        evaluate: the network's part of the step.
        top_p: of the most likely words that are drawn from; None for methods that know none.
        num_steps: the only possible number of steps; None where it can be chosen.
    """

    evaluate: Callable[[], object]
    top_p: float | None = None
    num_steps: int | None = None


# 1. LDLM


def latent_sampler(case: Case) -> tuple[Sampler, Workload]:
    """LDLM's step, a call of the pipeline with one step, and the decoding at the end."""
    step, decode = sampling_workloads(case)
    transformer = step.modules[0]
    assert isinstance(transformer, LDLMTransformer1DModel)
    size = (case.batch_size, transformer.config.sample_size, transformer.config.in_channels)
    latents, clean_latents = torch.randn(2, *size, device=case.device, dtype=DTYPES[case.dtype])

    @torch.no_grad()
    def evaluate() -> None:
        transformer(latents, 0.5, clean_latents)

    return Sampler("LDLM", step.run, step.modules, evaluate), decode


# 2. Token-level diffusion

# name → network, and sampler for K words
METHODS: dict[str, tuple[str, Callable[[int], TokenScheduler]]] = {
    "MDLM": ("masked", lambda _: MDLMScheduler()),
    "ReMDM": ("masked", lambda _: ReMDMScheduler()),
    "Duo": ("uniform", lambda _: DuoScheduler()),
    "Duo, psi-sampler": ("uniform", lambda _: PsiScheduler()),
    "CANDI": ("candi", CANDIScheduler),
    "FLM": ("flow", FLMScheduler),
    "FMLM": ("flow map", FMLMScheduler),
}


def vocab_size_of(geometry: Geometry) -> int:
    return LDLMTokenDecoderConfig(**geometry.token_decoder).vocab_size


def build_token_transformer(network: str, geometry: Geometry, length: int) -> TokenDiffusionTransformer:
    """The network of some methods, by its name in `METHODS`."""
    settings: dict[str, Any] = {"process": network}
    if network in ("flow", "flow map"):
        caps = FLMCapSettings()
        settings = {"process": "flow", "logit_cap": caps.logits, "attention_logit_cap": caps.attention}
        settings["next_timestep_conditioning"] = network == "flow map"
    sizes = {"vocab_size": vocab_size_of(geometry), "sample_size": length, **geometry.token_transformer}
    transformer = TokenDiffusionTransformer(**sizes, **settings)
    randomize_zero_weights(transformer)
    return transformer


def noisy_sample(scheduler: TokenScheduler, words: torch.Tensor, time: float, start: Any) -> Any:
    """Words (B, L) with as much noise as at a time of the grid, 1 - alpha_t = t (to 0.001).

    Args:
        start: the scheduler's, of the same shape. Of a flow it is the sample: all cost as much.
    """
    is_noisy = torch.rand(words.shape, device=words.device) < time
    if scheduler.process == "flow":
        return start
    if scheduler.process == "candi":
        return start._replace(words=words, revealed=~is_noisy)
    return torch.where(is_noisy, start, words)


@dataclass
class TokenStep:
    """The step of a token-level method from one sample, as often as it is called.

    Attributes:
        scheduler: with its grid, and the place on it where the step begins as `begin_index`.
        sample: at that place, as the scheduler has it.
    """

    transformer: TokenDiffusionTransformer
    scheduler: TokenScheduler
    sample: Any

    def __post_init__(self) -> None:
        self.timestep = self.scheduler.timesteps[self.scheduler.begin_index]
        # what a pipeline does once
        self.embeddings = self.transformer.word_embeddings.detach()

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """Logits (B, L, K)."""
        return self.transformer(**self.scheduler.model_inputs(self.sample, self.timestep)).logits

    @torch.no_grad()
    def __call__(self) -> Any:
        """The next sample."""
        logits = self.evaluate()
        # a copy, since a scheduler that has taken a step is at the next one
        scheduler: Any = copy.copy(self.scheduler)
        return scheduler.step(logits, self.timestep, self.sample, embeddings=self.embeddings).prev_sample


def token_samplers(case: Case) -> list[Sampler]:
    """The step in the middle of each method's grid."""
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    vocab_size, middle = vocab_size_of(case.sizes), case.num_steps // 2
    words = torch.randint(vocab_size, (case.batch_size, case.length), device=device)
    transformers: dict[str, TokenDiffusionTransformer] = {}
    starts: dict[str, Any] = {}
    samplers = []
    for name, (network, build_scheduler) in METHODS.items():
        if network not in transformers:
            transformers[network] = build_token_transformer(network, case.sizes, case.length).to(device, dtype).eval()
        transformer, scheduler = transformers[network], build_scheduler(vocab_size)
        scheduler.set_timesteps(case.num_steps, device)
        scheduler.set_begin_index(middle)
        if scheduler.process not in starts:
            # one for FLM and FMLM: it has a number for each word of the vocabulary
            starts[scheduler.process] = scheduler.start(words, vocab_size, None, transformer.word_embeddings.detach())
        sample = noisy_sample(scheduler, words, scheduler.grid[middle], starts[scheduler.process])
        step = TokenStep(transformer, scheduler, sample)
        samplers.append(Sampler(name, step, [transformer], step.evaluate, scheduler.config.get("top_p")))
    return samplers


# 3. The autoregressive model


def build_language_model(geometry: Geometry, length: int) -> GPT2LMHeadModel:
    """A GPT-2 as deep and as wide as the token-level methods' network: GPT-2 small at the paper's geometry."""
    with torch.device("meta"):
        config = TokenDiffusionTransformer(vocab_size_of(geometry), **geometry.token_transformer).config
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=length,
            n_embd=config.num_attention_heads * config.attention_head_dim,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def autoregressive_sampler(case: Case) -> Sampler:
    """The token in the middle of each text of the batch, after half a text in the cache."""
    language_model = build_language_model(case.sizes, case.length).to(case.device, DTYPES[case.dtype]).eval()
    vocab_size, half = language_model.config.vocab_size, case.length // 2
    pipeline = AutoregressivePipeline(language_model, build_tokenizer(vocab_size))
    words = torch.randint(vocab_size, (case.batch_size, half + 1), device=case.device)
    cache = DynamicCache(config=language_model.config)
    with torch.no_grad():
        language_model(words[:, :half], cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def evaluate() -> None:
        language_model(words[:, half:], cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    @torch.no_grad()
    def step() -> torch.Tensor:
        tokens, _ = pipeline.write_next(words[:, half:], cache, 1.0, 1.0, [None] * case.batch_size)
        cache.crop(-1)
        return tokens

    return Sampler("autoregressive, KV cache", step, [language_model], evaluate, 1.0, num_steps=case.length)
