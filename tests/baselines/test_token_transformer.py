"""The backbone of token-level diffusion: its size, what it reads for each process, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ldlm_hf import TokenDiffusionTransformer
from ldlm_hf.baselines.token_transformer import PROCESSES, attend_with_cap, rotate
from ldlm_hf.models.layers import attend


K, L = 11, 6


@pytest.fixture
def make(randomize: Callable[..., Any]) -> Callable[..., TokenDiffusionTransformer]:
    def build(process: str = "masked", **settings: Any) -> TokenDiffusionTransformer:
        torch.manual_seed(0)
        sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "condition_size": 12}
        model = TokenDiffusionTransformer(vocab_size=K, process=process, sample_size=L, **(sizes | settings))
        return randomize(model).eval()

    return build


def ids(batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(K, (batch_size, L), generator=torch.Generator().manual_seed(seed))


def test_the_papers_size() -> None:
    """169.6M with 50,258 outputs, of which theirs have one for the mask, by the sum of BASELINES.md's parts."""
    with torch.device("meta"):
        model = TokenDiffusionTransformer(vocab_size=50_257)
    found = sum(parameter.numel() for parameter in model.parameters())
    papers = 92.13e6 + 0.25e6 + 2 * 768 * 50_258
    assert found == pytest.approx(papers, rel=1e-3) and round(found / 1e6, 1) == 169.6


@pytest.mark.parametrize("process", PROCESSES)
def test_it_starts_as_a_uniform_distribution(process: str) -> None:
    model = TokenDiffusionTransformer(
        vocab_size=K, process=process, num_layers=1, num_attention_heads=1, attention_head_dim=8, sample_size=L
    )
    assert not model(ids(), 0.3).logits.any()
    assert len(model.embedding.weight) == K + (process == "masked")
    assert model.mask_token_id == (K if process == "masked" else None)


def test_what_it_reads(make: Callable[..., TokenDiffusionTransformer]) -> None:
    model, x = make("flow"), ids()
    expected = model(x, 0.5).logits
    assert expected.shape == (2, L, K)
    one_hot = F.one_hot(x, K).float()
    assert torch.allclose(model(weights=one_hot, timestep=torch.tensor([0.5, 0.5])).logits, expected, atol=1e-5)
    assert torch.allclose(model(inputs_embeds=model.embedding(x), timestep=0.5).logits, expected, atol=1e-5)
    assert not torch.allclose(model(x, 0.6).logits, expected, atol=1e-3)
    assert torch.equal(make()(x).logits, make()(x, 0.0).logits)


def test_candi_reads_clean_and_noisy_words(make: Callable[..., TokenDiffusionTransformer]) -> None:
    model, x = make("candi"), ids()
    assert torch.allclose(model.word_embeddings.norm(dim=-1), torch.ones(K))
    noise = torch.randn(2, L, 16)
    noisy = torch.tensor([True, False] * 3).expand(2, L)
    read = model.embed(x, None, noise, noisy)
    assert torch.allclose(read[~noisy], model.word_embeddings[x][~noisy])
    mark = F.normalize(model.noise_embedding, dim=0)
    assert torch.allclose(read[noisy], (0.5 * mark + 0.5 * noise)[noisy])


def test_caps(make: Callable[..., TokenDiffusionTransformer]) -> None:
    plain, capped = make("flow"), make("flow", logit_cap=0.5)
    expected = plain(ids(), 0.5).logits
    assert torch.allclose(capped(ids(), 0.5).logits, 0.5 * torch.tanh(expected / 0.5), atol=1e-5)
    query, key, value = torch.randn(3, 2, 2, L, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attend_with_cap(query, key, value, 1e4), attend(query, key, value), atol=1e-5)
    tight = attend_with_cap(query, key, value, 1e-6)
    assert torch.allclose(tight, value.mean(2).flatten(1)[:, None].expand_as(tight), atol=1e-5)
    some = make("flow", attention_logit_cap=0.01)(ids(), 0.5).logits
    assert not torch.allclose(some, expected, atol=1e-4)


def test_rotary_positions() -> None:
    """Products of turned queries and keys depend on the distance alone, and lengths stay."""
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 20, 8)
    scores = (rotate(query) @ rotate(key).mT)[0, 0]
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal))
    assert torch.allclose(rotate(query).norm(dim=-1), query.norm(dim=-1))
    # the pair k turns by 10,000^(-2k / width) at position 1
    unit = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    unit[..., 1] = 1
    turned = rotate(unit)[0, 0, 1]
    assert float(turned[1]) == pytest.approx(math.cos(0.1)) and float(turned[5]) == pytest.approx(math.sin(0.1))


def test_a_second_time(make: Callable[..., TokenDiffusionTransformer]) -> None:
    model = make("flow", next_timestep_conditioning=True)
    expected = model(ids(), 0.2).logits
    assert torch.equal(model(ids(), 0.2, next_timestep=0.2).logits, expected)
    assert not torch.allclose(model(ids(), 0.2, next_timestep=0.9).logits, expected, atol=1e-3)
    with pytest.raises(ValueError, match="next_timestep_conditioning=True"):
        make("flow")(ids(), 0.2, next_timestep=0.9)
    # at its start it is the network of one time
    torch.manual_seed(0)
    fresh = TokenDiffusionTransformer(K, "flow", 1, 1, 8, L, next_timestep_conditioning=True)
    assert not fresh.next_time_embedder(torch.randn(1, 256)).any()


def test_dropout_is_of_training_alone(make: Callable[..., TokenDiffusionTransformer]) -> None:
    model = make(dropout=0.5)
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_gradient_checkpointing_changes_nothing(make: Callable[..., TokenDiffusionTransformer]) -> None:
    gradients = []
    for is_enabled in (False, True):
        model = make("uniform", dropout=0.0).train()
        if is_enabled:
            model.enable_gradient_checkpointing()
        model(ids(), 0.4).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, atol=1e-7)


@pytest.mark.parametrize("process", PROCESSES)
def test_saving_and_loading(process: str, make: Callable[..., TokenDiffusionTransformer], tmp_path: Path) -> None:
    model = make(process)
    model.save_pretrained(tmp_path)
    loaded = TokenDiffusionTransformer.from_pretrained(tmp_path)
    assert torch.allclose(loaded(ids(), 0.5).logits, model(ids(), 0.5).logits, atol=1e-6)
    assert loaded.config.process == process


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"process": "mask"}, "process='mask' must be one of masked, uniform, candi, flow"),
        ({"attention_head_dim": 7}, "attention_head_dim=7 must be even"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"logit_cap": 0.0}, r"logit_cap=0.0 must lie in \(0, inf\)"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenDiffusionTransformer(vocab_size=K, **settings)
