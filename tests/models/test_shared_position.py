"""What the prefix costs a GPT-2 at its greatest length, where the last two tokens share the last learned position."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ldlm_hf import LDLMTokenEncoder


LENGTH = 32


@pytest.mark.slow
def test_a_shared_position_costs_nothing(repository: Path, tmp_path: Path) -> None:
    """A small GPT-2 of characters is trained; a linear probe then tells each character from its hidden state."""
    with gzip.open(repository / "training/data/state_of_the_union.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(600_000).lower()
    vocabulary = {character: index for index, character in enumerate(["<eos>", *sorted(set(text))])}
    characters = torch.tensor([vocabulary[character] for character in text])
    generator = torch.Generator().manual_seed(0)

    def windows(count: int) -> torch.Tensor:
        starts = torch.randint(len(characters) - LENGTH, (count, 1), generator=generator)
        return characters[starts + torch.arange(LENGTH)]

    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "n_positions": LENGTH, "n_embd": 64, "n_layer": 6, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        input_ids = windows(32)
        input_ids[::2] = F.pad(input_ids[::2, :-1], (1, 0), value=0)  # half of them begin with end-of-text
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 2.4
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token="<eos>")
    encoder = LDLMTokenEncoder.from_backbone(str(tmp_path), tokenizer=tokenizer)

    input_ids = windows(3000)
    encoder.fit_statistics([input_ids])
    hidden_states = encoder(input_ids).hidden_states
    inputs, targets = F.pad(hidden_states, (0, 1), value=1.0), F.one_hot(input_ids, len(vocabulary)).float()
    weights = torch.linalg.lstsq(inputs[:2000].flatten(0, 1), targets[:2000].flatten(0, 1)).solution
    told = ((inputs[2000:] @ weights).argmax(-1) == input_ids[2000:]).float().mean(0)  # (L,)
    spread = hidden_states.std(0).mean(-1)
    print(
        f"told: {told[-1]:.3f} at the shared position, {told[1:-2].mean():.3f} elsewhere, {told[0]:.3f} at the first"
    )
    print(f"spread: {spread[-1]:.3f} at the shared position, {spread[1:-2].mean():.3f} elsewhere")
    assert told[-1] > told[1:-2].mean() - 0.03
    assert spread[-1] == pytest.approx(spread[1:-2].mean().item(), rel=0.1)
    assert told[0] > told[1:-2].mean() - 0.03
