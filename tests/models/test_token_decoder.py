from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldlm_hf import LDLMTokenDecoder, LDLMTokenDecoderConfig


def make_decoder(**settings) -> LDLMTokenDecoder:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "token_hidden_size": 24,
    }
    return LDLMTokenDecoder(LDLMTokenDecoderConfig(**(sizes | settings)))


def test_head_alone_is_one_matrix():
    decoder = make_decoder(num_hidden_layers=0)
    assert [name for name, _ in decoder.named_parameters()] == ["head.weight"]
    hidden_states = torch.randn(2, 5, 24)
    torch.testing.assert_close(decoder(hidden_states).logits, hidden_states @ decoder.head.weight.T)


def test_layers_are_bidirectional_and_have_no_positions():
    decoder = make_decoder()
    hidden_states = torch.randn(1, 5, 24)
    logits = decoder(hidden_states).logits
    torch.testing.assert_close(decoder(hidden_states.flip(1)).logits, logits.flip(1), rtol=1e-4, atol=1e-5)
    changed = hidden_states.clone()
    changed[0, -1] += 1
    assert ((decoder(changed).logits - logits).abs().amax(-1) > 0).all()


def test_head_is_neither_tied_nor_resized_behind_ones_back():
    decoder = make_decoder()
    assert decoder.get_output_embeddings() is decoder.head
    assert not decoder.config.tie_word_embeddings
    assert not any("bias" in name for name, _ in decoder.named_parameters())
    assert decoder.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("arguments", "size"), [((33,), 33), ((33, 8), 40), ((None, 16), 32), ((20,), 20)])
@pytest.mark.parametrize("is_trained", [True, False])
def test_vocabulary_may_grow_and_shrink(tmp_path: Path, arguments: tuple, size: int, is_trained: bool):
    decoder = make_decoder().requires_grad_(is_trained)
    hidden_states = torch.randn(2, 5, 24)
    before = decoder(hidden_states).logits
    assert decoder.resize_token_embeddings(*arguments, mean_resizing=False) is decoder.head
    assert decoder.head.weight.requires_grad == is_trained
    assert decoder.config.vocab_size == size
    logits = decoder(hidden_states).logits
    assert logits.shape == (2, 5, size)
    kept = min(size, 30)
    torch.testing.assert_close(logits[..., :kept], before[..., :kept])
    decoder.save_pretrained(tmp_path)
    assert torch.equal(LDLMTokenDecoder.from_pretrained(tmp_path)(hidden_states).logits, logits)


def test_input_may_have_another_width():
    decoder = make_decoder(token_hidden_size=16)
    assert decoder(torch.randn(2, 5, 16)).logits.shape == (2, 5, 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_attention_heads": 7}, "num_attention_heads=7.*hidden_size=24"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_decoder(**settings)


@pytest.mark.parametrize(("positions", "words"), [(1024, 4096), (4, 7), (3, 30), (1, 1)])
def test_most_likely_tokens_are_the_argmax(randomize, monkeypatch: pytest.MonkeyPatch, positions: int, words: int):
    decoder = randomize(make_decoder())
    monkeypatch.setattr(LDLMTokenDecoder, "_positions_at_once", positions)
    monkeypatch.setattr(LDLMTokenDecoder, "_words_at_once", words)
    hidden_states = torch.randn(3, 5, 24)
    found = decoder.most_likely_tokens(hidden_states)
    assert found.dtype == torch.long
    assert len(found.unique()) > 3
    assert torch.equal(found, decoder(hidden_states).logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_most_likely(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Small whole numbers, whose logits are exact: every word is there three times, in several slices."""
    monkeypatch.setattr(LDLMTokenDecoder, "_words_at_once", 7)
    decoder = make_decoder(num_hidden_layers=0).to(dtype)
    weight = torch.randint(-2, 3, (10, 24), generator=torch.Generator().manual_seed(0))
    decoder.head.weight.data.copy_(weight.repeat(3, 1))
    hidden_states = torch.randint(-2, 3, (4, 50, 24), generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden_states[0, 0] = 0  # all logits are equal
    found = decoder.most_likely_tokens(hidden_states)
    assert torch.equal(found, decoder(hidden_states).logits.argmax(-1))
    assert found.max() < 10
    assert found[0, 0] == 0
    decoder.head.weight.data.fill_(-torch.inf)
    assert not decoder.most_likely_tokens(torch.ones(1, 2, 24, dtype=dtype)).any()


def test_a_head_s_bias_and_hooks_count(randomize):
    decoder = randomize(make_decoder())
    hidden_states = torch.randn(2, 5, 24)
    decoder.set_output_embeddings(torch.nn.Linear(24, 30))
    torch.nn.init.normal_(decoder.head.bias, std=9)
    assert torch.equal(decoder.most_likely_tokens(hidden_states), decoder(hidden_states).logits.argmax(-1))
    decoder = randomize(make_decoder())
    smallest = decoder(hidden_states).logits.argmin(-1)
    decoder.head.register_forward_hook(lambda _, __, logits: -logits)
    assert torch.equal(decoder.most_likely_tokens(hidden_states), smallest)


def test_a_head_that_is_more_than_a_matrix_is_asked_itself():
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return -super().forward(hidden_states)

    decoder = make_decoder()
    head = Adapted(24, 30, bias=False)
    head.weight = decoder.head.weight
    hidden_states = torch.randn(2, 5, 24)
    logits = decoder(hidden_states).logits
    decoder.set_output_embeddings(head)
    assert torch.equal(decoder.most_likely_tokens(hidden_states), logits.argmin(-1))


def test_most_likely_tokens_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5, 23\).*token_hidden_size=24"):
        make_decoder().most_likely_tokens(torch.zeros(2, 5, 23))
