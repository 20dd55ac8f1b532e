"""The token-level models that the benchmark times: their posteriors against Bayes' rule, and what their steps do."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from speed import token_level_peers
from speed.token_level_peers import (
    TokenLevelDenoiser,
    denoising_step,
    generate_autoregressively,
    masked_posterior,
    sample_categorical,
    uniform_posterior,
)


VOCAB, MASK, LENGTH = 5, 5, 6
TIMES = [(0.9, 0.4), (0.5, 0.49), (1.0, 0.3), (0.2, 0.0), (1.0, 0.0)]


def masking(keep: float) -> torch.Tensor:
    """Transition matrix (V + 1, V + 1), rows from: a word stays with probability `keep`, or else becomes the mask."""
    matrix = keep * torch.eye(VOCAB + 1, dtype=torch.float64)
    matrix[:, MASK] += 1 - keep
    return matrix


def replacing(keep: float) -> torch.Tensor:
    """Transition matrix (V, V): a word stays with probability `keep`, or else becomes any word."""
    return keep * torch.eye(VOCAB, dtype=torch.float64) + (1 - keep) / VOCAB


NOISES = [(masked_posterior, masking), (uniform_posterior, replacing)]


def posterior_by_bayes(noise, clean: torch.Tensor, alpha_t: float, alpha_s: float) -> torch.Tensor:
    """q(z_s | z_t, x) for every z_t, of a distribution x over clean tokens: (z_t, z_s)."""
    states = noise(1.0).shape[0]
    clean = torch.nn.functional.pad(clean, (0, states - VOCAB))
    at_s = clean @ noise(alpha_s)  # q(z_s | x)
    joint = at_s[:, None] * noise(alpha_t / alpha_s)  # q(z_s | x) q(z_t | z_s)
    return (joint / joint.sum(0)).T


@pytest.mark.parametrize(("t", "s"), TIMES)
@pytest.mark.parametrize(("posterior", "noise"), NOISES)
def test_posterior_is_bayes_rule(posterior, noise, t: float, s: float):
    if posterior is masked_posterior:
        # a word that is there stays, whatever the model predicts for its place; a mask follows the prediction
        clean, token_ids = torch.rand(VOCAB, dtype=torch.float64).softmax(-1), torch.tensor([MASK])
    else:
        clean, token_ids = torch.rand(VOCAB, dtype=torch.float64).softmax(-1), torch.arange(VOCAB)
    found = posterior(clean.expand(len(token_ids), -1), token_ids, 1 - t, 1 - s)
    expected = posterior_by_bayes(noise, clean, 1 - t, 1 - s)[token_ids]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[:, 0]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("t", "s"), TIMES)
@pytest.mark.parametrize(("posterior", "noise"), NOISES)
def test_a_step_from_t_leads_to_the_marginal_at_s(posterior, noise, t: float, s: float):
    """sum over z_t of q(z_t | x) q(z_s | z_t, x) = q(z_s | x) for each clean token x."""
    for word in range(VOCAB):
        at_t, at_s = noise(1 - t)[word], noise(1 - s)[word]
        token_ids = torch.arange(len(at_t))
        clean = torch.eye(VOCAB)[word].expand(len(token_ids), -1)
        torch.testing.assert_close(at_t @ posterior(clean, token_ids, 1 - t, 1 - s), at_s)


def test_words_stay_where_noise_is_a_mask():
    clean = torch.rand(VOCAB, VOCAB).softmax(-1)
    found = masked_posterior(clean, torch.arange(VOCAB), 0.4, 0.7)
    assert torch.equal(found, torch.eye(VOCAB + 1, dtype=torch.float64)[:VOCAB])


def test_sample_categorical_has_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 7.0):  # weights need not sum to 1
        drawn = sample_categorical((scale * probabilities).expand(100_000, -1), generator)
        torch.testing.assert_close(drawn.bincount(minlength=4) / 100_000, probabilities.float(), rtol=0, atol=0.006)
        assert not (drawn == 1).any()


def make_denoiser(length: int = LENGTH) -> TokenLevelDenoiser:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_inner=32, n_positions=length)
    return TokenLevelDenoiser(config)


@pytest.mark.parametrize("posterior", [masked_posterior, uniform_posterior])
def test_last_step_draws_the_prediction(posterior, randomize, monkeypatch: pytest.MonkeyPatch):
    """At s = 0 what is left is x, which a head of large weights makes one word a position."""
    monkeypatch.setattr(token_level_peers, "POSITIONS_AT_ONCE", 7)
    denoiser = randomize(make_denoiser())
    denoiser.positions.data.normal_()
    denoiser.head.weight.data.mul_(1e4)
    token_ids = torch.full((3, LENGTH), MASK)
    if posterior is uniform_posterior:
        token_ids = torch.randint(VOCAB, (3, LENGTH))
    expected = denoiser.head(denoiser(token_ids, torch.tensor(1.0))).argmax(-1)
    assert len(expected.unique()) > 1
    assert torch.equal(denoising_step(denoiser, posterior, token_ids, 1.0, 0.0), expected)


def test_share_of_masks_after_a_step():
    """Each mask is left with probability (1 − alpha_s) / (1 − alpha_t) = s / t, and words stay."""
    denoiser = make_denoiser(length=500)
    token_ids = torch.randint(VOCAB + 1, (40, 500), generator=torch.Generator().manual_seed(0))
    token_ids[:, ::2] = MASK
    found = denoising_step(denoiser, masked_posterior, token_ids, 0.8, 0.2, torch.Generator().manual_seed(1))
    was_mask = token_ids == MASK
    assert torch.equal(found[~was_mask], token_ids[~was_mask])
    assert (found[was_mask] == MASK).float().mean() == pytest.approx(0.25, abs=0.015)


def test_share_of_words_that_stay_in_a_uniform_step():
    """With an even prediction both marginals are even, and q(z_s = z_t | z_t) is q(z_t | z_s = z_t)."""
    denoiser = make_denoiser(length=500)
    denoiser.head.weight.data.zero_()
    token_ids = torch.randint(VOCAB, (40, 500), generator=torch.Generator().manual_seed(0))
    found = denoising_step(denoiser, uniform_posterior, token_ids, 0.8, 0.2, torch.Generator().manual_seed(1))
    expected = 0.25 + 0.75 / VOCAB  # alpha_t|s + (1 − alpha_t|s) / V
    assert (found == token_ids).float().mean() == pytest.approx(expected, abs=0.015)
    assert found.max() < VOCAB


def test_autoregressive_tokens_with_a_cache_are_those_without():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=3, eos_token_id=3, tie_word_embeddings=False)).eval()
    model.lm_head.weight.data.mul_(1e5)  # one word has all the probability
    tokens = generate_autoregressively(model, 2, 8)
    assert tokens.shape == (2, 8)
    expected = torch.tensor([[3], [3]])
    with torch.no_grad():
        for _ in range(8):
            following = model(expected).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, following], dim=1)
    assert torch.equal(tokens, expected[:, 1:])
    assert len(tokens.unique()) > 1
