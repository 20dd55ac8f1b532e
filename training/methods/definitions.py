"""What `configs/methods.yaml` holds: bases and methods, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablations.definitions import JOINT, check_known
from ldlm_hf.baselines.recipes import RECIPES
from ldlm_hf.evaluation.samplers import OWN, Sampler
from ldlm_hf.loading.checks import check_settings
from ldlm_hf.loading.settings_reader import parse, to_config
from ldlm_hf.training.recipe import PipelineRecipe
from ldlm_hf.training.recipes.joint import JointRecipe


# what trains a method: script and its first argument
SCRIPTS: dict[str, type[PipelineRecipe]] = {JOINT: JointRecipe} | {
    f"train_baseline.py {name}": recipe for name, recipe in RECIPES.items()
}


@dataclass
class MethodEvaluation:
    """How methods are evaluated; without a judge, generative perplexity and MAUVE are left out."""

    num_samples: int = 1000  # of each sampling seed
    sampling_seeds: int = 5
    nfe: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128, 256, 512, 1024])  # evaluations, at most
    frontier_nfe: int = 1024
    judge: str | None = "openai-community/gpt2-large"
    batch_size: int = 16
    judge_batch_size: int = 8

    def __post_init__(self) -> None:
        positive = ("num_samples", "sampling_seeds", "frontier_nfe", "batch_size", "judge_batch_size")
        check_settings(type(self).__init__, vars(self), **dict.fromkeys(positive, "[1, inf)"))


@dataclass
class MethodBase:
    """A text and a size on which methods are compared. Files are named relative to that of the methods."""

    accelerate: str = ""  # of `accelerate launch`
    reference: str = "ldlm"  # the method whose training FLOPs all others get
    steps: int = 1  # of that method
    overrides: dict[str, Any] = field(default_factory=dict)  # of all methods
    evaluation: MethodEvaluation = field(default_factory=MethodEvaluation)


@dataclass
class Method:
    """A training run and how it is sampled; or another way to sample the weights of another method."""

    title: str = ""
    script: str | None = None
    configs: dict[str, str] = field(default_factory=dict)  # base → file
    overrides: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides for one base only
    needs: str | None = None  # the method that it is distilled from
    steps_share: float = 1.0  # of the steps of that one
    weights: str | None = None  # the method whose weights are sampled
    sampler: str = OWN
    nfe: list[int] = field(default_factory=lambda: [1, 0])  # [a, b]: N steps are a N + b evaluations of the network
    frontier: list[str] = field(default_factory=list)  # further samplers

    def steps_within(self, nfe: int) -> int:
        """The most steps, one at least, in so many evaluations of the network."""
        of_step, further = self.nfe
        return max(1, (nfe - further) // of_step)


@dataclass
class Methods:
    """Bases and methods by their names."""

    bases: dict[str, MethodBase] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)

    def on_base(self, base: str) -> list[str]:
        """Names of the methods that a base has a configuration of."""
        return [name for name in self.methods if base in self.methods[self.trained_as(name)].configs]

    def trained_as(self, name: str) -> str:
        """The method whose weights are sampled."""
        return self.methods[name].weights or name


def read_methods(path: Path) -> Methods:
    """Reads and checks a file of methods; ValueError for an unknown key, or a name that is not defined."""
    if not path.is_file():
        raise OSError(f"--config {str(path)!r}: there is no such file of methods.")
    loaded = to_config(parse(path.read_text(encoding="utf-8"), str(path)), str(path))
    try:
        methods: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Methods), loaded))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} ({error.full_key}).") from error
    check_methods(methods, path)
    return methods


def check_methods(methods: Methods, path: Path) -> None:
    """Raises ValueError for a script, base, method or sampler that is named and does not exist."""
    earlier: list[str] = []
    for name, method in methods.methods.items():
        where = f"{path}: method {name!r}:"
        if (method.script is None) == (method.weights is None):
            raise ValueError(f"{where} either its script is named, or the method whose weights it samples.")
        if method.script is not None:
            check_known(f"{where} script", method.script, SCRIPTS)
        # only methods above, so that none needs itself by way of others
        for other in filter(None, (method.needs, method.weights)):
            check_known(f"{where} method", other, earlier)
        for base in [*method.configs, *method.bases]:
            check_known(f"{where} base", base, methods.bases)
        for sampler in [method.sampler, *method.frontier]:
            Sampler.parse(sampler)
        earlier.append(name)
    for name, base_ in methods.bases.items():
        check_known(f"{path}: base {name!r}: reference", base_.reference, methods.on_base(name))
