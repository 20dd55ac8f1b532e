"""Training: the loop and what it stands on.

[`TrainingLoop`] trains a [`Recipe`]; [`run`] makes one from a command line and finishes its run. The recipes of this
package lie in `recipes/`, the scripts that name them in the repository's `training/`.
"""

from .launch import run
from .loop import TrainingLoop
from .recipe import Evaluation, PipelineRecipe, Recipe, StepLosses
from .settings import EvaluationSettings, LoopSettings, OptimizerSettings, RunSettings, TrainingSettings


__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "LoopSettings",
    "OptimizerSettings",
    "PipelineRecipe",
    "Recipe",
    "RunSettings",
    "StepLosses",
    "TrainingLoop",
    "TrainingSettings",
    "run",
]
