"""The optimisers of a run: AdamW (the paper's), or Muon for the matrices of layers and AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .settings import OptimizerSettings


def build_optimizers(module: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Optimisers of all trained parameters: fused AdamW (App. C), and with `name="muon"` Muon for layers' matrices."""
    matrices = layer_matrices(module) if settings.name == "muon" else []
    of_muon = {id(matrix) for matrix in matrices}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in of_muon]
    rate = settings.initial_learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, fused=True, **adamw_arguments(settings))
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=rate, **muon_arguments(settings)))
    return optimizers


def layer_matrices(module: nn.Module) -> list[torch.Tensor]:
    """Trained weights of linear layers, but those of vocabulary heads."""
    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    heads = [part.get_output_embeddings() for part in parts]
    layers = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in heads]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def set_arguments(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> None:
    """Gives an optimiser what the settings say beside the learning rate, which every step sets."""
    arguments = adamw_arguments if isinstance(optimizer, torch.optim.AdamW) else muon_arguments
    for group in optimizer.param_groups:
        group.update(arguments(settings))


def adamw_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    return {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def muon_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    # its updates then have the size of AdamW's, so that one learning rate fits both (Liu et al., 2025)
    return {"weight_decay": settings.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
