"""What a run is made of at a step: all that a checkpoint holds, and a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from .batches import TrainingBatches
from .optimizers import build_optimizers, set_arguments
from .recipe import Recipe
from .settings import OptimizerSettings


TRAINED_WEIGHTS = "model.safetensors"


class EMAWeights(EMAModel):
    """[`~diffusers.training_utils.EMAModel`] without the copies of all weights that its step makes."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        """Moves the averages towards the parameters (Polyak averaging, with the warmup of the base class)."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


def names_left_out(module: nn.Module) -> set[str]:
    """Weights of a module that no checkpoint holds: frozen ones, and second names of tied ones."""
    once = dict(module.named_parameters())
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return {name for name in names if name not in once or not once[name].requires_grad}


class RunState:
    """Weights, optimiser, EMA weights, position in the text, the recipe's state and counters.

    Attributes:
        module: the recipe's, as accelerate has wrapped or sharded it.
        optimizers: one or two, each of some of the parameters.
        parameters: the trained ones.
        ema: their exponential moving average; of sharded parameters this rank's part.
        step: optimiser steps done.
        seconds: of training, evaluations and checkpoints included, over all resumed parts.
        nonfinite_steps: how many steps were skipped.
    """

    def __init__(
        self, recipe: Recipe, batches: TrainingBatches, accelerator: Accelerator, settings: OptimizerSettings
    ):
        self.recipe = recipe
        self.batches = batches
        self.accelerator = accelerator
        self.settings = settings
        self.step = 0
        self.seconds = 0.0
        self.nonfinite_steps = 0
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.is_sharded and settings.name == "muon":
            raise ValueError(
                "optimizer.name=muon with FSDP: Muon needs each matrix whole, and these are sharded. Use DDP, or "
                "optimizer.name=adamw."
            )
        self.left_out = names_left_out(recipe.module)
        self.module, *self.optimizers = accelerator.prepare(recipe.module, *build_optimizers(recipe.module, settings))
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.ema = EMAWeights(self.local_parameters(), decay=settings.ema_decay, foreach=True)
        trained = [name for name, parameter in recipe.module.named_parameters() if parameter.requires_grad]
        recipe.use_ema_weights(dict(zip(trained, self.ema.shadow_params, strict=True)))
        accelerator.register_save_state_pre_hook(self.save_trained_weights)
        accelerator.register_load_state_pre_hook(self.load_trained_weights)

    def local_parameters(self) -> list[torch.Tensor]:
        """The trained parameters; of sharded ones this rank's part, since averaging knows plain tensors only."""
        return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in self.parameters]

    def set_learning_rate(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def update_weights(self, is_finite: torch.Tensor) -> None:
        """A step of the optimisers and of the EMA weights; weights stay as they are where gradients are not finite.

        Fused AdamW skips its update where `found_inf` says so, on the device. For Muon, which knows no such thing, the
        host looks.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                optimizer.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
                optimizer.step()
            elif bool(is_finite):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.local_parameters())

    def copy_ema_weights(self, snapshot: nn.Module | None) -> None:
        """Loads the EMA weights into the main process's snapshot; all processes take part."""
        self.ema.store(self.local_parameters())
        self.ema.copy_to(self.local_parameters())
        weights = self.accelerator.get_state_dict(self.module)
        if snapshot is not None:
            snapshot.load_state_dict(weights)
            snapshot.eval()
        self.ema.restore(self.local_parameters())

    def save(self, folder: Path) -> None:
        """Writes the state into a folder: once, and what differs between ranks for each of them.

        Random states are not part of it: all that is random depends on seed, step and row.
        """
        rank, is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.accelerator.save_state(str(folder))
        if is_main or self.is_sharded:
            # by their place among the trained parameters
            weights = {str(index): weight.contiguous() for index, weight in enumerate(self.ema.shadow_params)}
            save_file(weights, folder / self.ema_weights_name(rank))
        # the recipe's state is the same for all of them, and is there to be compared
        rank_state = {"data": self.batches.state_dict(), "task": self.recipe.state_dict()}
        torch.save(rank_state, folder / f"rank_{rank}.pt")
        if is_main:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "nonfinite_steps": self.nonfinite_steps,
                "world_size": self.accelerator.num_processes,
                "is_sharded": self.is_sharded,
                "ema_step": self.ema.optimization_step,
            }
            torch.save(state, folder / "run_state.pt")

    def load(self, checkpoint: Path) -> None:
        """Loads a checkpoint; ValueError where it is of another kind of run or of another layout."""
        rank = self.accelerator.process_index
        state = torch.load(checkpoint / "run_state.pt", map_location="cpu", weights_only=True)
        self.check_layout(checkpoint, state)
        own = checkpoint / f"rank_{rank}.pt"
        # of a rank that did not exist then; positions that depend on the rank are refused by `load_state_dict`
        rank_state_file = own if own.is_file() else checkpoint / "rank_0.pt"
        rank_state = torch.load(rank_state_file, map_location="cpu", weights_only=True)
        self.batches.load_state_dict(rank_state["data"])
        self.recipe.load_state_dict(rank_state["task"])
        self.accelerator.load_state(str(checkpoint))
        for optimizer in self.optimizers:
            # a checkpoint brings those of its own run, which a new one may have gone on from with others
            set_arguments(optimizer.optimizer, self.settings)
        weights = load_file(checkpoint / self.ema_weights_name(rank))
        for index, weight in enumerate(self.ema.shadow_params):
            weight.copy_(weights[str(index)])
        self.ema.optimization_step = state["ema_step"]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.nonfinite_steps = state["nonfinite_steps"]
        self.accelerator.print(f"resumed from {checkpoint} at step {self.step}")

    def check_layout(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Raises ValueError for sharded weights of another number of processes."""
        layout = (state["world_size"], state["is_sharded"])
        present = (self.accelerator.num_processes, self.is_sharded)
        if layout != present and (state["is_sharded"] or self.is_sharded):
            raise ValueError(
                f"{checkpoint} was written by {layout[0]} processes ({'sharded' if layout[1] else 'not sharded'}), "
                f"and this run has {present[0]} ({'sharded' if present[1] else 'not sharded'}): EMA weights that "
                "are sharded belong to their layout. Resume with the same one."
            )

    def ema_weights_name(self, rank: int) -> str:
        """File of the EMA weights; sharded ones have a file for each rank."""
        return f"averaged_weights_{rank}.safetensors" if self.is_sharded else "averaged_weights.safetensors"

    def save_trained_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        """accelerate's hook before saving: the frozen language model comes from its own source, so leave it out."""
        # a sharded model is saved by accelerate itself, and `weights` is empty
        while weights:
            state = {name.removeprefix("module."): value for name, value in weights.pop().items()}
            if self.accelerator.is_main_process:
                trained = {name: value.contiguous() for name, value in state.items() if name not in self.left_out}
                save_file(trained, Path(folder) / TRAINED_WEIGHTS)

    def load_trained_weights(self, models: list[nn.Module], folder: str) -> None:
        """accelerate's hook before loading."""
        while models:
            module = self.accelerator.unwrap_model(models.pop())
            found = module.load_state_dict(load_file(Path(folder) / TRAINED_WEIGHTS), strict=False)
            missing = set(found.missing_keys) - self.left_out
            if missing or found.unexpected_keys:
                raise ValueError(
                    f"{folder} holds other weights than this run trains: missing {sorted(missing)[:3]}, unexpected "
                    f"{sorted(found.unexpected_keys)[:3]}."
                )
