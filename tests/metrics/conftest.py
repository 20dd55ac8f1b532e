"""Tiny judges: a GPT-2 with random weights and a tokenizer of whole words, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import datasets
import evaluate
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ldlm_hf.metrics import Judge


WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "fish",
    "sat",
    "ran",
    "flew",
    "swam",
    "on",
    "under",
    "over",
    "mat",
    "tree",
    "river",
    "house",
    "slowly",
    "quickly",
    "and",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


def tiny_gpt2(vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # Wide weights, so that predictions and features really depend on the text.
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def judge() -> Judge:
    tokenizer = word_tokenizer()
    return Judge(tiny_gpt2(len(tokenizer)), tokenizer, name="tiny")


@pytest.fixture
def make_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    return word_tokenizer


@pytest.fixture
def make_model() -> Callable[[int], GPT2LMHeadModel]:
    return tiny_gpt2


@pytest.fixture(scope="session", autouse=True)
def evaluate_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the files that `evaluate` writes out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path_factory.mktemp("evaluate")))
    datasets.disable_progress_bars()
    evaluate.disable_progress_bar()
    yield
    patch.undo()
