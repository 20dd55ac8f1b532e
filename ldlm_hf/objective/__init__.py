"""The joint-training recipe, one equation of the paper a function."""

from .joint import JointLosses, JointObjective, JointObjectiveSettings
from .likelihood import LikelihoodBound, LikelihoodSettings, LikelihoodTerms
from .timesteps import AdaptiveTimestepSampler, TimestepSamplerSettings, UniformTimestepSampler
from .warmup import scale_gradient, warmup_gate


__all__ = [
    "AdaptiveTimestepSampler",
    "JointLosses",
    "JointObjective",
    "JointObjectiveSettings",
    "LikelihoodBound",
    "LikelihoodSettings",
    "LikelihoodTerms",
    "TimestepSamplerSettings",
    "UniformTimestepSampler",
    "scale_gradient",
    "warmup_gate",
]
