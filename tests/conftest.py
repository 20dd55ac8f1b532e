"""Tiny real components: a tokenizer of whole words, language models with random weights, and all parts of an LDLM."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTokenEncoder,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
)


torch.set_num_threads(1)
diffusers_logging.disable_progress_bar()

REPOSITORY = Path(__file__).parents[1]
VOCAB_SIZE, TOKEN_WIDTH, SEQUENCE_LENGTH, NUM_LATENTS, LATENT_SIZE = 40, 32, 8, 6, 16


def randomize_parameters(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Moves every parameter off its start, so that no zero, one or identity hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    return randomize_parameters


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """40 tokens: unknown, end of text, and the words w2 to w39, whose ids are their numbers."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved language models of four blocks with random weights: `gpt2`, `bert` and `llama`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": TOKEN_WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2}
    language_models = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=TOKEN_WIDTH, n_layer=4, n_head=2, bos_token_id=1)
        ),
        "bert": BertForMaskedLM(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16)),
        "llama": LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=16)
        ),
    }
    folders = {}
    for name, model in language_models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        randomize_parameters(model).save_pretrained(folders[name])
    return folders


@pytest.fixture
def random_tokens() -> Callable[..., torch.Tensor]:
    """Token ids (B, L)"""

    def draw(batch_size: int = 3, length: int = SEQUENCE_LENGTH, seed: int = 0) -> torch.Tensor:
        return torch.randint(2, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def make_components(backbone_folders: dict[str, Path], random_tokens: Callable[..., torch.Tensor]) -> Callable:
    """All parts of a tiny LDLM in training order, with L = 8 tokens, N = 6 latents and every width its own."""

    def make(representation: str = "hidden", seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        token_encoder = LDLMTokenEncoder.from_backbone(str(backbone_folders["gpt2"]), representation=representation)
        if representation != "scratch":
            token_encoder.fit_statistics(random_tokens(8, seed=batch) for batch in range(4))
        sizes = {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "sequence_length": SEQUENCE_LENGTH,
            "num_latents": NUM_LATENTS,
            "latent_size": LATENT_SIZE,
            "token_hidden_size": TOKEN_WIDTH,
        }
        token_decoder_config = LDLMTokenDecoderConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            token_hidden_size=TOKEN_WIDTH,
        )
        transformer = LDLMTransformer1DModel(
            in_channels=LATENT_SIZE,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            sample_size=NUM_LATENTS,
        )
        return {
            "token_encoder": token_encoder,
            "latent_encoder": LDLMLatentEncoder(LDLMLatentEncoderConfig(**sizes)),
            "latent_decoder": LDLMLatentDecoder(LDLMLatentDecoderConfig(**sizes)),
            "token_decoder": LDLMTokenDecoder(token_decoder_config),
            "transformer": randomize_parameters(transformer),
            "scheduler": TangentEulerMaruyamaScheduler(),
        }

    return make


@pytest.fixture
def make_pipeline(make_components: Callable, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LDLMPipeline]:
    """A tiny pipeline; components may be replaced or left out (None)."""

    def make(**components: Any) -> LDLMPipeline:
        pipe = LDLMPipeline(**(make_components() | {"tokenizer": tiny_tokenizer} | components))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command of `training/` with a command line, in this process."""

    def run(command: str, *arguments: str) -> None:
        # accelerate keeps the devices and precision of a process's first run
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        runpy.run_path(str(REPOSITORY / "training" / f"{command}.py"), run_name="__main__")

    return run
