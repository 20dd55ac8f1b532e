from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from transformers import AutoModel

from ldlm_hf import TangentDDIMScheduler, diffusers_config
from ldlm_hf.training.components import build_token_decoder, load_part


ARGUMENTS = {"vocab_size": 40, "token_hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2}


def test_head_starts_from_the_token_embeddings_of_a_language_model(backbone_folders: dict[str, Path]) -> None:
    backbone = str(backbone_folders["gpt2"])
    head = build_token_decoder(ARGUMENTS | {"hidden_size": 32}, head_from=backbone).head.weight
    embeddings = AutoModel.from_pretrained(backbone).get_input_embeddings().weight
    torch.testing.assert_close(head, embeddings - embeddings.mean(0))
    assert not torch.allclose(build_token_decoder(ARGUMENTS | {"hidden_size": 32}).head.weight, head)


def test_head_of_another_shape_is_refused(backbone_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"of shape \(40, 32\), but has the shape \(40, 24\).*hidden_size=32"):
        build_token_decoder(ARGUMENTS | {"hidden_size": 24}, head_from=str(backbone_folders["gpt2"]))


@pytest.mark.parametrize("own", [True, False])
def test_scheduler_keeps_its_class(make_pipeline: Callable, tmp_path: Path, own: bool) -> None:
    pipe = make_pipeline()
    if own:
        pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config, eta=0.5)
    else:
        pipe.scheduler = UniPCMultistepScheduler.from_config(diffusers_config(pipe.scheduler))
    pipe.save_pretrained(tmp_path)
    loaded = load_part(str(tmp_path), "scheduler")
    assert type(loaded) is type(pipe.scheduler)
    # what was left at its default is noted on construction only
    assert {**loaded.config} == {
        key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"
    }
