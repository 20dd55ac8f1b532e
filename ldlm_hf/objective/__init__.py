"""The joint-training recipe, one equation of the paper a function, and distillation to few steps."""

from .conditioning import ConditioningSettings
from .consistency import ConsistencySettings
from .flow_map import DistillationLosses, DistillationObjective
from .joint import JointLosses, JointObjective, JointObjectiveSettings
from .likelihood import LikelihoodBound, LikelihoodSettings, LikelihoodTerms
from .timesteps import AdaptiveTimestepSampler, TimestepSamplerSettings, UniformTimestepSampler
from .warmup import scale_gradient, warmup_gate


__all__ = [
    "AdaptiveTimestepSampler",
    "ConditioningSettings",
    "ConsistencySettings",
    "DistillationLosses",
    "DistillationObjective",
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
