"""ldlm_hf: the Latent Diffusion Language Model (Meshchaninov et al., 2026) for diffusers and transformers.

Shapes are written with the same letters everywhere: B batch, L tokens, N latents, D width, d_z latent width,
V vocabulary. Time t runs in [0, 1], 0 = clean and 1 = noise.

    h  = token_encoder(input_ids)      (B, L) → (B, L, D)      frozen language model, standardised
    z  = latent_encoder(h)             (B, L, D) → (B, N, d_z)
    h^ = latent_decoder(z)             (B, N, d_z) → (B, L, D)
    w  = token_decoder(h^).argmax      (B, L, D) → (B, L, V) → (B, L)
    z^ = transformer(z_t, t, s)        (B, N, d_z) → (B, N, d_z)  the denoiser, s its own earlier estimate
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

# names that diffusers looks up in this package, to know what kind of component it loads
from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

from .registration import register
from .schedulers import SCHEDULERS, TOKEN_SCHEDULERS


__version__ = "0.1.0"

_MODULES = {
    "baselines.autoregressive": ["AutoregressivePipeline"],
    "baselines.pipeline_token_diffusion": ["TokenDiffusionPipeline"],
    "baselines.token_transformer": ["TokenDiffusionTransformer"],
    "data": ["DataSettings", "load_corpora"],
    "loading.pretrained_sources": ["resolve_pretrained_source"],
    "metrics": ["GenerativePerplexity", "Mauve", "NGramDiversity", "Repetition", "TokenEntropy"],
    "models.latent_decoder": ["LDLMLatentDecoder", "LDLMLatentDecoderConfig"],
    "models.latent_encoder": ["LDLMLatentEncoder", "LDLMLatentEncoderConfig"],
    "models.token_decoder": ["LDLMTokenDecoder", "LDLMTokenDecoderConfig"],
    "models.token_encoder": ["LDLMTokenEncoder", "LDLMTokenEncoderConfig"],
    "models.transformer_ldlm": ["LDLMTransformer1DModel"],
    "objective": [
        "AdaptiveTimestepSampler",
        "DistillationLosses",
        "DistillationObjective",
        "JointLosses",
        "JointObjective",
        "JointObjectiveSettings",
        "LikelihoodBound",
        "LikelihoodSettings",
        "TimestepSamplerSettings",
        "UniformTimestepSampler",
        "scale_gradient",
        "warmup_gate",
    ],
    "pipelines.pipeline_ldlm": ["LDLMPipeline"],
    "pipelines.pipeline_output": ["LDLMPipelineOutput"],
    "pipelines.prompts": ["GivenTokens"],
    "schedulers.discrete": ["diffusers_config"],
    "schedulers.scheduling_tangent": ["TangentScheduler", "TangentSchedulerOutput"],
}
_MODULE_OF_NAME = {name: module for module, names in _MODULES.items() for name in names}
_MODULE_OF_NAME |= {name: f"schedulers.{module}" for name, module in SCHEDULERS.items()}
_MODULE_OF_NAME |= {name: f"baselines.{module}" for name, module in TOKEN_SCHEDULERS.items()}

if TYPE_CHECKING:
    from .baselines.autoregressive import AutoregressivePipeline
    from .baselines.candi import CANDIScheduler
    from .baselines.flow_language_model import FLMScheduler, FMLMScheduler
    from .baselines.masked import MDLMScheduler, ReMDMScheduler
    from .baselines.pipeline_token_diffusion import TokenDiffusionPipeline
    from .baselines.token_transformer import TokenDiffusionTransformer
    from .baselines.uniform import DuoScheduler, PsiScheduler
    from .data import DataSettings, load_corpora
    from .loading.pretrained_sources import resolve_pretrained_source
    from .metrics import GenerativePerplexity, Mauve, NGramDiversity, Repetition, TokenEntropy
    from .models.latent_decoder import LDLMLatentDecoder, LDLMLatentDecoderConfig
    from .models.latent_encoder import LDLMLatentEncoder, LDLMLatentEncoderConfig
    from .models.token_decoder import LDLMTokenDecoder, LDLMTokenDecoderConfig
    from .models.token_encoder import LDLMTokenEncoder, LDLMTokenEncoderConfig
    from .models.transformer_ldlm import LDLMTransformer1DModel
    from .objective import (
        AdaptiveTimestepSampler,
        DistillationLosses,
        DistillationObjective,
        JointLosses,
        JointObjective,
        JointObjectiveSettings,
        LikelihoodBound,
        LikelihoodSettings,
        TimestepSamplerSettings,
        UniformTimestepSampler,
        scale_gradient,
        warmup_gate,
    )
    from .pipelines.pipeline_ldlm import LDLMPipeline
    from .pipelines.pipeline_output import LDLMPipelineOutput
    from .pipelines.prompts import GivenTokens
    from .schedulers.discrete import diffusers_config
    from .schedulers.scheduling_tangent import TangentScheduler, TangentSchedulerOutput

    # a solver that is not named here is Any to a type checker
    from .schedulers.scheduling_tangent_churn import TangentChurnScheduler as TangentChurnScheduler
    from .schedulers.scheduling_tangent_ddim import TangentDDIMScheduler as TangentDDIMScheduler
    from .schedulers.scheduling_tangent_dpmsolver_multistep import (
        TangentDPMSolverMultistepScheduler as TangentDPMSolverMultistepScheduler,
    )
    from .schedulers.scheduling_tangent_euler_maruyama import (
        TangentEulerMaruyamaScheduler as TangentEulerMaruyamaScheduler,
    )
    from .schedulers.scheduling_tangent_flow_map import TangentFlowMapScheduler as TangentFlowMapScheduler


def __getattr__(name: str) -> Any:
    """Imports a public name's module at its first use, so that sampling need not import what evaluation needs."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF_NAME])


__all__ = [
    "AdaptiveTimestepSampler",
    "AutoregressivePipeline",
    "CANDIScheduler",
    "DataSettings",
    "DistillationLosses",
    "DistillationObjective",
    "DuoScheduler",
    "FLMScheduler",
    "FMLMScheduler",
    "GenerativePerplexity",
    "GivenTokens",
    "JointLosses",
    "JointObjective",
    "JointObjectiveSettings",
    "LDLMLatentDecoder",
    "LDLMLatentDecoderConfig",
    "LDLMLatentEncoder",
    "LDLMLatentEncoderConfig",
    "LDLMPipeline",
    "LDLMPipelineOutput",
    "LDLMTokenDecoder",
    "LDLMTokenDecoderConfig",
    "LDLMTokenEncoder",
    "LDLMTokenEncoderConfig",
    "LDLMTransformer1DModel",
    "LikelihoodBound",
    "LikelihoodSettings",
    "MDLMScheduler",
    "Mauve",
    "ModelMixin",
    "NGramDiversity",
    "PreTrainedModel",
    "PsiScheduler",
    "ReMDMScheduler",
    "Repetition",
    "SchedulerMixin",
    "TangentScheduler",
    "TangentSchedulerOutput",
    "TimestepSamplerSettings",
    "TokenDiffusionPipeline",
    "TokenDiffusionTransformer",
    "TokenEntropy",
    "UniformTimestepSampler",
    "diffusers_config",
    "load_corpora",
    "resolve_pretrained_source",
    "scale_gradient",
    "warmup_gate",
]
__all__ += SCHEDULERS

register(sys.modules[__name__])
