"""Tiny real components: a tokenizer of whole words, language models with random weights, and all parts of an LDLM."""

from __future__ import annotations

import copy
import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
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
    FMLMScheduler,
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
    TokenDiffusionPipeline,
    TokenDiffusionTransformer,
)
from loopback_hub import LoopbackHub


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
def backbone_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """Saved language models of four blocks with random weights, and their tokenizer: `gpt2`, `bert` and `llama`."""
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
        tiny_tokenizer.save_pretrained(folders[name])
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


@pytest.fixture
def make_conditional_pipeline(
    make_components: Callable, make_pipeline: Callable[..., LDLMPipeline]
) -> Callable[[], LDLMPipeline]:
    """A tiny pipeline whose denoiser is told what is given, with a latent for each of L = 8 tokens."""

    def make() -> LDLMPipeline:
        parts = make_components()
        for name, model_class in (("latent_encoder", LDLMLatentEncoder), ("latent_decoder", LDLMLatentDecoder)):
            config = copy.deepcopy(parts[name].config)
            config.num_latents = SEQUENCE_LENGTH
            parts[name] = randomize_parameters(model_class(config).eval())
        transformer = LDLMTransformer1DModel.from_config(
            parts["transformer"].config, sample_size=SEQUENCE_LENGTH, role_embeds=True
        )
        parts["transformer"] = randomize_parameters(transformer)
        return make_pipeline(**parts)

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


@pytest.fixture
def tiny_overrides(backbone_folders: dict[str, Path], tiny_tokenizer, tmp_path: Path) -> list[str]:
    """Settings of a run that takes a second: L = 8, four steps of eight sequences, `tmp_path/run`."""
    tiny_tokenizer.save_pretrained(backbone_folders["gpt2"])
    generator = random.Random(0)
    lines = [" ".join(f"w{generator.randint(2, 39)}" for _ in range(60)) for _ in range(40)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    layers = "hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48"
    return [
        f"model.backbone={backbone_folders['gpt2']}",
        "model.sequence_length=8",
        "model.statistics_sequences=32",
        f"model.latent_encoder={{{layers}}}",
        f"model.latent_decoder={{{layers}}}",
        f"model.token_decoder={{{layers}}}",
        "model.transformer={num_layers: 1, num_attention_heads: 2, attention_head_dim: 12}",
        f"data.source={tmp_path / 'corpus.txt'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.holdout_documents=8",
        "objective.decoder_noise=0.5",
        "timestep_sampler.update_every=2",
        "warmup.steps=2",
        "optimizer.lr_warmup_steps=2",
        f"loop.output_dir={tmp_path / 'run'}",
        "loop.max_steps=4",
        "loop.batch_size=8",
        "loop.logging_steps=1",
        "loop.mixed_precision=no",
        "loop.trackers=[]",
        # which is measured otherwise
        "loop.peak_tflops=1",
        "evaluation.every=0",
        "evaluation.num_sequences=16",
        "evaluation.num_samples=4",
        "evaluation.num_inference_steps=3",
        "evaluation.judge=null",
    ]


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running server. The access token `hf_org` is that of the user `org`, `hf_other` that of `other`."""
    with LoopbackHub({"hf_org": "org", "hf_other": "other"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs code in a fresh process and returns what its last line of output says, as JSON.

    With `installed=False` the process imports from every place that this one does, except those that hold `ldlm_hf`.
    It leaves `.pth` files unread (-S), by which an editable installation shows itself.
    """

    def run(code: str, *arguments: str | Path, installed: bool) -> Any:
        home = tmp_path_factory.mktemp("home")
        places = [place for place in sys.path if place and not (Path(place) / "ldlm_hf").exists()]
        environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("HF_MODULES_CACHE", None)
        if not installed:
            environment["PYTHONPATH"] = os.pathsep.join(places)
        command = [sys.executable, *([] if installed else ["-S"]), "-c", code, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture
def make_token_pipeline(tiny_tokenizer: Any, randomize: Callable[..., Any]) -> Callable[[Any], TokenDiffusionPipeline]:
    """A tiny token-level pipeline of random weights for a scheduler, with L = 8 tokens."""

    def build(scheduler: Any) -> TokenDiffusionPipeline:
        torch.manual_seed(0)
        transformer = TokenDiffusionTransformer(
            vocab_size=VOCAB_SIZE,
            process=scheduler.process,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            sample_size=SEQUENCE_LENGTH,
            next_timestep_conditioning=isinstance(scheduler, FMLMScheduler),
        )
        pipe = TokenDiffusionPipeline(randomize(transformer, 0.1).eval(), scheduler, tiny_tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build
