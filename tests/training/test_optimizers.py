from __future__ import annotations

import pytest
import torch

from ldlm_hf import JointObjective
from ldlm_hf.training.optimizers import build_optimizers, layer_matrices
from ldlm_hf.training.settings import OptimizerSettings


def test_every_trained_parameter_has_one_optimiser(make_components):
    objective = JointObjective(**make_components())
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(objective, OptimizerSettings(name=name))
        held = [id(p) for one in optimizers for group in one.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in objective.parameters() if p.requires_grad)


def test_muon_has_the_matrices_of_layers(make_components):
    objective = JointObjective(**make_components())
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    matrices = {names[id(matrix)] for matrix in layer_matrices(objective)}
    assert all(objective.get_parameter(name).ndim == 2 for name in matrices)
    assert not any("token_encoder" in name or name == "token_decoder.head.weight" for name in matrices)
    assert {"transformer.proj_out.weight", "latent_encoder.proj_in.weight"} <= matrices
    # learned latents and positions are no matrices of layers
    others = {n for n, p in objective.named_parameters() if p.requires_grad and p.ndim == 2} - matrices
    assert all(any(word in name for word in ("head", "position", "latents", "queries")) for name in others), others


def test_updates_of_muon_are_as_large_as_those_of_adamw():
    """Where the gradients are noise: 0.2 learning rates, as Liu et al. (2025) measured of AdamW."""
    layer = torch.nn.Linear(300, 200, bias=False)
    settings = OptimizerSettings(name="muon", initial_learning_rate=1e-3, weight_decay=0.0)
    _, muon = build_optimizers(torch.nn.ModuleList([layer, torch.nn.LayerNorm(2)]), settings)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(200, 300)
    muon.step()
    assert float((layer.weight.detach() - before).square().mean().sqrt()) == pytest.approx(0.2e-3, rel=0.25)


def test_an_older_torch_has_no_muon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"name='muon' needs torch 2\.9"):
        OptimizerSettings(name="muon")
