"""The methods that `training/train_baseline.py` trains, by their names."""

from __future__ import annotations

from ..training.recipe import PipelineRecipe
from .autoregressive import AutoregressiveRecipe
from .candi import CANDIRecipe
from .flow_language_model import FLMRecipe, FMLMRecipe
from .masked import MDLMRecipe
from .uniform import DCDRecipe, DuoRecipe


RECIPES: dict[str, type[PipelineRecipe]] = {
    "autoregressive": AutoregressiveRecipe,
    "mdlm": MDLMRecipe,
    "duo": DuoRecipe,
    "duo_dcd": DCDRecipe,
    "candi": CANDIRecipe,
    "flm": FLMRecipe,
    "fmlm": FMLMRecipe,
}
