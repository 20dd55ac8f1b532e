from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ldlm_hf import LDLMTokenEncoder, LDLMTokenEncoderConfig
from ldlm_hf.models.language_model import UNMASKED_ATTENTION


LAYERS = [0, 1, -3, -2, -1]


@pytest.fixture(params=["gpt2", "bert", "llama"])
def folder(request: pytest.FixtureRequest, backbone_folders: dict[str, Path]) -> Path:
    return backbone_folders[request.param]


@pytest.fixture
def gpt2(backbone_folders: dict[str, Path]) -> str:
    return str(backbone_folders["gpt2"])


def language_model(folder: Path) -> PreTrainedModel:
    auto_class = AutoModelForMaskedLM if folder.name.startswith("bert") else AutoModelForCausalLM
    return auto_class.from_pretrained(folder).eval()


def fitted(encoder: LDLMTokenEncoder, random_tokens: Callable[..., torch.Tensor]) -> LDLMTokenEncoder:
    encoder.fit_statistics(random_tokens(8, seed=batch) for batch in range(3))
    return encoder


@pytest.mark.parametrize("layer", LAYERS)
def test_hidden_is_transformers_own_hidden_state(folder: Path, layer: int, random_tokens: Callable):
    """`hidden_states[layer]` of the whole language model, the one of layer -1 being behind the final norm."""
    model = language_model(folder)
    input_ids = random_tokens()
    with torch.no_grad():
        expected = model(input_ids=input_ids, output_hidden_states=True).hidden_states[layer]
    encoder = LDLMTokenEncoder.from_backbone(str(folder), layer=layer, prefix=False)
    torch.testing.assert_close(encoder.run_backbone(input_ids), expected, rtol=1e-5, atol=1e-5)

    encoder = fitted(encoder, random_tokens)
    standardised = encoder(input_ids).hidden_states
    torch.testing.assert_close(standardised, (expected - encoder.mean) / encoder.std, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder(input_ids, return_dict=False)[0], standardised)


def test_last_hidden_state_of_gpt2_is_behind_its_final_norm(gpt2: str, random_tokens: Callable):
    recorded: list[torch.Tensor] = []
    model = AutoModel.from_pretrained(gpt2).eval()
    model.h[-1].register_forward_hook(lambda _, __, output: recorded.append(output))
    with torch.no_grad():
        model(input_ids=random_tokens())
        before_norm = recorded[0][0] if isinstance(recorded[0], tuple) else recorded[0]
        expected = model.ln_f(before_norm)
    last = LDLMTokenEncoder.from_backbone(gpt2, layer=-1, prefix=False)
    torch.testing.assert_close(last.run_backbone(random_tokens()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before_norm, expected, atol=0.1)
    assert last.config.apply_final_norm
    assert not LDLMTokenEncoder.from_backbone(gpt2, layer=-2).config.apply_final_norm


@pytest.mark.parametrize(("layer", "num_blocks"), [(0, 0), (1, 1), (-3, 2), (-2, 3), (-1, 4), (4, 4)])
def test_only_the_blocks_needed_are_kept(folder: Path, layer: int, num_blocks: int):
    encoder = LDLMTokenEncoder.from_backbone(str(folder), layer=layer)
    block_numbers = {name.split(".")[n + 1] for name in encoder.state_dict() for n in block_list_place(name)}
    assert block_numbers == {str(i) for i in range(num_blocks)}
    assert not any("pooler" in name or "lm_head" in name for name in encoder.state_dict())
    has_final_norm = any(".ln_f." in name or name.endswith("backbone.norm.weight") for name in encoder.state_dict())
    assert has_final_norm == (num_blocks == 4 and not folder.name.startswith("bert"))


def block_list_place(name: str) -> list[int]:
    parts = name.split(".")
    return [n for n, part in enumerate(parts[:-1]) if part in ("h", "layer", "layers") and parts[n + 1].isdigit()]


@pytest.mark.parametrize("layer", [5, -6])
def test_layers_that_do_not_exist(gpt2: str, layer: int):
    with pytest.raises(ValueError, match=rf"layer={layer} does not exist.*-5 to 4"):
        LDLMTokenEncoder.from_backbone(gpt2, layer=layer)


def test_embedding_is_the_token_embedding_alone(folder: Path, random_tokens: Callable):
    weight = language_model(folder).get_input_embeddings().weight
    encoder = fitted(LDLMTokenEncoder.from_backbone(str(folder), representation="embedding"), random_tokens)
    input_ids = random_tokens()
    torch.testing.assert_close(encoder(input_ids).hidden_states, (weight[input_ids] - encoder.mean) / encoder.std)
    # the same token gives the same vector wherever it stands
    assert torch.equal(encoder(input_ids).hidden_states.flip(1), encoder(input_ids.flip(1)).hidden_states)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_scratch_is_trainable_and_needs_no_statistics(gpt2: str, random_tokens: Callable):
    encoder = LDLMTokenEncoder.from_backbone(gpt2, representation="scratch").train()
    assert encoder.training
    assert encoder.is_fitted
    encoder(random_tokens()).hidden_states.sum().backward()
    (embedding,) = encoder.parameters()
    assert embedding.shape == (40, 32)
    assert embedding.grad.abs().sum() > 0
    assert embedding.std().item() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="scratch"):
        encoder.fit_statistics([random_tokens()])


@pytest.mark.parametrize("representation", ["hidden", "embedding"])
def test_frozen_and_always_in_evaluation_mode(gpt2: str, random_tokens: Callable, representation: str, tmp_path: Path):
    encoder = fitted(LDLMTokenEncoder.from_backbone(gpt2, representation=representation), random_tokens)
    encoder.save_pretrained(tmp_path)
    for model in (encoder, LDLMTokenEncoder.from_pretrained(tmp_path)):
        model.train()
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        first, second = model(random_tokens()).hidden_states, model(random_tokens()).hidden_states
        assert torch.equal(first, second)
        assert not first.requires_grad


def test_statistics_standardise_the_sample(folder: Path, random_tokens: Callable):
    batches = [random_tokens(16, seed=seed) for seed in range(4)]
    encoder = LDLMTokenEncoder.from_backbone(str(folder))
    encoder.fit_statistics(iter(batches))
    hidden_states = torch.cat([encoder(batch).hidden_states for batch in batches]).flatten(0, 1).double()
    torch.testing.assert_close(hidden_states.mean(0), torch.zeros(32).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden_states.var(0, unbiased=False), torch.ones(32).double(), rtol=1e-5, atol=1e-5)
    assert encoder.config.num_statistics_tokens == 4 * 16 * 8


def test_statistics_agree_with_a_direct_computation_at_large_offsets(gpt2: str, random_tokens: Callable):
    """A mean of 3,000 beside a deviation of 0.05: E[x^2] - E[x]^2 in float32 would give noise."""
    encoder = LDLMTokenEncoder.from_backbone(gpt2, representation="embedding")
    with torch.no_grad():
        encoder.embedding.weight.mul_(0.05).add_(torch.linspace(-3000, 3000, 32))
    batches = [{"input_ids": random_tokens(rows, seed=rows)} for rows in (1, 7, 64)]
    encoder.fit_statistics(batches)
    vectors = torch.cat([encoder.embedding(batch["input_ids"]).flatten(0, 1) for batch in batches]).double()
    expected = vectors.var(0, unbiased=False).clamp_min(1e-4).sqrt()
    torch.testing.assert_close(encoder.mean.double(), vectors.mean(0), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(encoder.std.double(), expected, rtol=1e-6, atol=0)
    assert (encoder.mean.dtype, encoder.std.dtype) == (torch.float32, torch.float32)


def test_variance_is_floored(gpt2: str, random_tokens: Callable):
    encoder = LDLMTokenEncoder.from_backbone(gpt2, representation="embedding")
    with torch.no_grad():
        encoder.embedding.weight[:, 3] = 7.0
    encoder = fitted(encoder, random_tokens)
    assert encoder.std[3].item() == pytest.approx(0.01)
    assert torch.equal(encoder(random_tokens()).hidden_states[..., 3], torch.zeros(3, 8))


def test_statistics_may_be_fitted_again(gpt2: str, random_tokens: Callable):
    encoder = fitted(LDLMTokenEncoder.from_backbone(gpt2), random_tokens)
    expected = encoder.mean.clone(), encoder.std.clone()
    encoder.fit_statistics([random_tokens(2, seed=99)])
    assert not torch.equal(encoder.mean, expected[0])
    encoder = fitted(encoder, random_tokens)
    assert torch.equal(encoder.mean, expected[0])
    assert torch.equal(encoder.std, expected[1])


def test_unfitted_is_an_error(gpt2: str, random_tokens: Callable):
    encoder = LDLMTokenEncoder.from_backbone(gpt2)
    assert not encoder.is_fitted
    with pytest.raises(ValueError, match=r"fit_statistics"):
        encoder(random_tokens())


@pytest.mark.parametrize("batches", [[], [torch.empty(0, 8, dtype=torch.long)]])
def test_nothing_to_fit_on(gpt2: str, batches: list[torch.Tensor]):
    encoder = LDLMTokenEncoder.from_backbone(gpt2)
    with pytest.raises(ValueError, match="at least one"):
        encoder.fit_statistics(batches)
    assert not encoder.is_fitted


@pytest.mark.parametrize("layer", LAYERS)
def test_saving_keeps_the_statistics(folder: Path, layer: int, random_tokens: Callable, tmp_path: Path):
    encoder = fitted(LDLMTokenEncoder.from_backbone(str(folder), layer=layer), random_tokens)
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert str(folder) not in (tmp_path / "config.json").read_text()
    for loaded in (LDLMTokenEncoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is LDLMTokenEncoder
        assert loaded.is_fitted
        assert torch.equal(loaded(random_tokens()).hidden_states, encoder(random_tokens()).hidden_states)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LDLMTokenEncoderConfig)


def test_statistics_stay_float32_when_loaded_in_bfloat16(folder: Path, random_tokens: Callable, tmp_path: Path):
    encoder = fitted(LDLMTokenEncoder.from_backbone(str(folder)), random_tokens)
    encoder.save_pretrained(tmp_path)
    half = LDLMTokenEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(half.mean, encoder.mean)
    assert torch.equal(half.std, encoder.std)
    hidden_states = half(random_tokens()).hidden_states
    assert hidden_states.dtype == torch.bfloat16
    torch.testing.assert_close(hidden_states.float(), encoder(random_tokens()).hidden_states, rtol=0.2, atol=0.2)

    half.save_pretrained(tmp_path / "half")
    again = LDLMTokenEncoder.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(again.mean, encoder.mean)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_scratch_survives_saving_and_stays_trainable(gpt2: str, random_tokens: Callable, tmp_path: Path):
    encoder = LDLMTokenEncoder.from_backbone(gpt2, representation="scratch")
    encoder.save_pretrained(tmp_path)
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_tokens()).hidden_states, encoder(random_tokens()).hidden_states)
    assert loaded.embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (torch.zeros(2, 8), "torch.float32"),
        (torch.zeros(2, 8, dtype=torch.bool), "torch.bool"),
        (torch.zeros(8, dtype=torch.long), r"\(8,\)"),
        (torch.zeros(2, 17, dtype=torch.long), "17 tokens are longer than the 16"),
        (torch.full((2, 8), 40), "40, outside the vocabulary of 40"),
        (torch.full((2, 8), -1), "from -1"),
    ],
)
def test_bad_token_ids(gpt2: str, random_tokens: Callable, input_ids: torch.Tensor, message: str):
    encoder = LDLMTokenEncoder.from_backbone(gpt2)
    with pytest.raises(ValueError, match=message):
        encoder.fit_statistics([input_ids])
    encoder = fitted(encoder, random_tokens)
    with pytest.raises(ValueError, match=message):
        encoder(input_ids)


def test_int32_token_ids_are_token_ids(gpt2: str, random_tokens: Callable):
    encoder = fitted(LDLMTokenEncoder.from_backbone(gpt2), random_tokens)
    input_ids = random_tokens()
    assert torch.equal(encoder(input_ids.int()).hidden_states, encoder(input_ids).hidden_states)


def test_bad_settings(gpt2: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"representation='nonsense'.*hidden, embedding, scratch"):
        LDLMTokenEncoder.from_backbone(gpt2, representation="nonsense")
    with pytest.raises(ValueError, match="representation='nonsense'"):
        LDLMTokenEncoderConfig(representation="nonsense")
    with pytest.raises(ValueError, match="backbone_config"):
        LDLMTokenEncoderConfig(representation="hidden")
    with pytest.raises(OSError, match="nowhere"):
        LDLMTokenEncoder.from_backbone(str(tmp_path / "nowhere"))


# the token before the text


@pytest.mark.parametrize("layer", [1, -3, -1])
def test_prefix_is_read_before_the_text_and_its_state_dropped(folder: Path, layer: int, random_tokens: Callable):
    input_ids = random_tokens()
    encoder = LDLMTokenEncoder.from_backbone(str(folder), layer=layer)
    assert encoder.config.prefix_token_id == 1  # the tokenizer's end-of-text: it has neither BOS nor CLS
    with torch.no_grad():
        with_prefix = language_model(folder)(
            input_ids=torch.nn.functional.pad(input_ids, (1, 0), value=1), output_hidden_states=True
        )
    expected = with_prefix.hidden_states[layer][:, 1:]
    torch.testing.assert_close(encoder.run_backbone(input_ids), expected, rtol=1e-5, atol=1e-5)
    output = fitted(encoder, random_tokens)(input_ids, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states, (expected - encoder.mean) / encoder.std, rtol=1e-4, atol=1e-4)
    assert {states.shape for states in output.backbone_hidden_states} == {(3, 8, 32)}
    assert encoder.config.num_statistics_tokens == 3 * 8 * 8
    encoder.set_attn_implementation("eager")
    assert encoder(input_ids, output_attentions=True).attentions[0].shape == (3, 2, 9, 9)


def test_the_first_token_counts_behind_a_prefix(gpt2: str, random_tokens: Callable):
    """Language models make an attention sink of whatever stands first, as this one does by a large first position."""
    spreads = {}
    for prefix in (True, False):
        encoder = LDLMTokenEncoder.from_backbone(gpt2, layer=-1, prefix=prefix)
        with torch.no_grad():
            encoder.backbone.wpe.weight[0] *= 1000
        encoder = fitted(encoder, random_tokens)
        spreads[prefix] = encoder(random_tokens(256)).hidden_states.std(0).mean(-1)
    assert spreads[False][0] < 0.1 * spreads[False][1:].mean()
    assert spreads[True][0] == pytest.approx(spreads[True][1:].mean().item(), rel=0.2)


def test_the_longest_text_has_room_for_the_prefix(folder: Path, random_tokens: Callable, tmp_path: Path):
    """Its last two tokens share the last position where positions are learned."""
    input_ids = random_tokens(length=16)
    encoder = fitted(LDLMTokenEncoder.from_backbone(str(folder)), random_tokens)
    assert encoder.config.max_position_embeddings == 16
    encoder.save_pretrained(tmp_path)
    hidden_states = encoder(input_ids).hidden_states
    assert torch.equal(LDLMTokenEncoder.from_pretrained(tmp_path)(input_ids).hidden_states, hidden_states)
    with pytest.raises(ValueError, match="17 tokens are longer than the 16"):
        encoder(random_tokens(length=17))
    for name, table in encoder.backbone.named_parameters():
        if name in ("wpe.weight", "embeddings.position_embeddings.weight"):
            assert table.shape == (17, 32)
            assert torch.equal(table[16], table[15])


def test_positions_that_begin_behind_the_padding_token_are_not_counted(
    tiny_tokenizer: PreTrainedTokenizerFast, random_tokens: Callable, tmp_path: Path
):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=40, max_position_embeddings=18, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, cls_token="w2", eos_token="<eos>"
    )
    for prefix in (True, False):
        encoder = LDLMTokenEncoder.from_backbone(str(tmp_path), layer=-1, prefix=prefix, tokenizer=tokenizer)
        assert encoder.config.max_position_embeddings == 16
        assert encoder.config.prefix_token_id == (2 if prefix else None)
        assert encoder.run_backbone(random_tokens(length=16)).shape == (3, 16, 32)
        with pytest.raises(ValueError, match="17 tokens are longer than the 16"):
            encoder.fit_statistics([random_tokens(length=17)])


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (OPTForCausalLM, OPTConfig(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16)),
        # relative positions have a table, too, which is none of positions
        (
            DebertaV2ForMaskedLM,
            DebertaV2Config(relative_attention=True, position_buckets=16, max_position_embeddings=16),
        ),
        (BloomForCausalLM, BloomConfig(n_layer=2, n_head=2)),
        # rotary positions, computed ahead for so many tokens
        (GPTJForCausalLM, GPTJConfig(n_positions=16, rotary_dim=8)),
        (CodeGenForCausalLM, CodeGenConfig(n_positions=16, rotary_dim=8)),
    ],
)
def test_other_positions_have_room_for_the_prefix(
    model_class: Any, config: Any, tiny_tokenizer: PreTrainedTokenizerFast, random_tokens: Callable, tmp_path: Path
):
    config.update({"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})
    config.update({"intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1})
    model_class(config).save_pretrained(tmp_path / "backbone")
    encoder = LDLMTokenEncoder.from_backbone(str(tmp_path / "backbone"), layer=-1, tokenizer=tiny_tokenizer)
    encoder.fit_statistics([random_tokens(length=16)])
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path / "encoder")
    hidden_states = loaded(random_tokens(length=16)).hidden_states
    assert hidden_states.shape == (3, 16, 32) and hidden_states.isfinite().all()


def test_a_tokenizer_without_a_token_for_the_prefix_is_refused(gpt2: str, tiny_tokenizer: PreTrainedTokenizerFast):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no token to put before the text.*prefix=False"):
        LDLMTokenEncoder.from_backbone(gpt2, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="prefix_token_id=3 with representation='embedding'"):
        LDLMTokenEncoderConfig(prefix_token_id=3)
    with pytest.raises(ValueError, match=r"prefix_token_id=50257 must lie in \[0, 50257\)"):
        LDLMTokenEncoderConfig(prefix_token_id=50257)


# what a user of transformers does with a model


@pytest.mark.parametrize("representation", ["hidden", "embedding", "scratch"])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_vocabulary_may_grow(
    folder: Path, random_tokens: Callable, tmp_path: Path, representation: str, mean_resizing: bool
):
    encoder = LDLMTokenEncoder.from_backbone(str(folder), representation=representation)
    if representation != "scratch":
        encoder = fitted(encoder, random_tokens)
    assert encoder.get_input_embeddings().weight.shape == (40, 32)
    input_ids, new_ids = random_tokens(), torch.tensor([[2, 44]])
    before = encoder(input_ids).hidden_states
    with pytest.raises(ValueError, match="outside the vocabulary of 40"):
        encoder(new_ids)

    embedding = encoder.resize_token_embeddings(45, mean_resizing=mean_resizing)
    assert embedding is encoder.get_input_embeddings()
    assert embedding.weight.shape == (45, 32)
    assert embedding.weight.requires_grad == (representation == "scratch")
    assert encoder.config.vocab_size == 45
    assert torch.equal(encoder(input_ids).hidden_states, before)
    expected = encoder(new_ids).hidden_states
    assert torch.isfinite(expected).all()
    with pytest.raises(ValueError, match="outside the vocabulary of 45"):
        encoder(new_ids + 1)

    encoder.save_pretrained(tmp_path)
    assert torch.equal(LDLMTokenEncoder.from_pretrained(tmp_path)(new_ids).hidden_states, expected)


@pytest.mark.parametrize("representation", ["hidden", "embedding", "scratch"])
def test_embeddings_may_be_replaced(folder: Path, random_tokens: Callable, representation: str):
    encoder = LDLMTokenEncoder.from_backbone(str(folder), representation=representation)
    before = encoder.run_backbone(random_tokens())
    embedding = torch.nn.Embedding(40, 32)
    encoder.set_input_embeddings(embedding)
    assert encoder.get_input_embeddings() is embedding
    assert embedding.weight.requires_grad == (representation == "scratch")
    assert not torch.allclose(encoder.run_backbone(random_tokens()), before, atol=0.1)


def test_attention_implementation_reaches_the_language_model(folder: Path, random_tokens: Callable, tmp_path: Path):
    fitted(LDLMTokenEncoder.from_backbone(str(folder)), random_tokens).save_pretrained(tmp_path)
    encoder = LDLMTokenEncoder.from_pretrained(tmp_path)
    expected = encoder(random_tokens()).hidden_states

    def check(encoder: LDLMTokenEncoder, implementation: str) -> None:
        assert encoder.backbone.config._attn_implementation == implementation
        torch.testing.assert_close(encoder(random_tokens()).hidden_states, expected, rtol=1e-4, atol=1e-4)

    check(encoder, UNMASKED_ATTENTION)
    encoder.set_attn_implementation("eager")
    check(encoder, "eager")
    # torch's fused attention, which here needs no masks
    encoder.set_attn_implementation("sdpa")
    check(encoder, UNMASKED_ATTENTION)
    check(LDLMTokenEncoder.from_pretrained(tmp_path, attn_implementation="eager"), "eager")
    check(LDLMTokenEncoder.from_pretrained(tmp_path, attn_implementation="sdpa"), UNMASKED_ATTENTION)
    check(AutoModel.from_pretrained(tmp_path, attn_implementation="eager"), "eager")
    from_backbone = LDLMTokenEncoder.from_backbone(str(folder), attn_implementation="eager")
    check(fitted(from_backbone, random_tokens), "eager")
    with pytest.raises(ValueError, match="nonsense"):
        LDLMTokenEncoder.from_pretrained(tmp_path, attn_implementation="nonsense")


def test_hidden_states_and_attentions_of_the_language_model(folder: Path, random_tokens: Callable, tmp_path: Path):
    model, input_ids = language_model(folder), random_tokens()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=input_ids, output_hidden_states=True, output_attentions=True)
    encoder = LDLMTokenEncoder.from_backbone(str(folder), prefix=False, attn_implementation="eager")
    encoder = fitted(encoder, random_tokens)
    plain = encoder(input_ids)
    assert list(plain.keys()) == ["hidden_states"]

    output = encoder(input_ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.hidden_states, plain.hidden_states)
    # the embeddings and two blocks of four
    for name, count in (("backbone_hidden_states", 3), ("attentions", 2)):
        found = getattr(output, name)
        assert len(found) == count
        for one, other in zip(found, getattr(expected, name.removeprefix("backbone_")), strict=False):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    as_tuple = encoder(input_ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], plain.hidden_states) and len(as_tuple[1]) == 3

    encoder.save_pretrained(tmp_path)
    loaded = LDLMTokenEncoder.from_pretrained(tmp_path, output_hidden_states=True, output_attentions=True)
    assert loaded(input_ids).to_tuple()[1:] and loaded(input_ids).attentions[0].shape == (3, 2, 8, 8)


def test_attentions_that_there_are_not_are_refused(gpt2: str, random_tokens: Callable):
    encoder = fitted(LDLMTokenEncoder.from_backbone(gpt2), random_tokens)
    with pytest.raises(ValueError, match=r"output_attentions=True.*set_attn_implementation\('eager'\)"):
        encoder(random_tokens(), output_attentions=True)
    encoder = LDLMTokenEncoder.from_backbone(gpt2, representation="scratch")
    with pytest.raises(ValueError, match="output_attentions=True.*representation='scratch'"):
        encoder(random_tokens(), output_attentions=True)
    output = encoder(random_tokens(), output_hidden_states=True)
    assert torch.equal(output.backbone_hidden_states[0], encoder.embedding(random_tokens()))


# --------------------------------------------------------------------------- saved without the language model


@pytest.fixture
def packaged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The language model as a file of an installed package, which everybody can have."""
    package = tmp_path / "packages" / "tiny_language_model"
    shutil.copytree(folder, package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    return "package:tiny_language_model/model"


@pytest.mark.parametrize("representation", ["hidden", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_language_model_need_not_be_saved(
    packaged: str, representation: str, dtype: torch.dtype, random_tokens: Callable, tmp_path: Path
) -> None:
    encoder = fitted(LDLMTokenEncoder.from_backbone(packaged, representation=representation), random_tokens).to(dtype)
    encoder.mean, encoder.std = encoder.mean.float(), encoder.std.float()
    encoder.leave_out_backbone()
    encoder.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == {"mean", "std"}
    for loaded in (
        LDLMTokenEncoder.from_pretrained(tmp_path / "saved", dtype=dtype),
        LDLMTokenEncoder.from_pretrained(tmp_path, subfolder="saved", dtype=dtype),
        AutoModel.from_pretrained(tmp_path / "saved", dtype=dtype),
    ):
        assert loaded.dtype == dtype and loaded.mean.dtype == torch.float32
        tokens = random_tokens()
        assert torch.equal(loaded(tokens).hidden_states, encoder(tokens).hidden_states)
        assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    # it stays that way
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size < 1000


def test_a_language_model_of_this_machine_alone_is_saved(gpt2: str, random_tokens: Callable) -> None:
    encoder = fitted(LDLMTokenEncoder.from_backbone(gpt2), random_tokens)
    assert encoder.config.backbone_source is None
    with pytest.raises(ValueError, match="has to come from a Hub id or package:NAME/FOLDER"):
        encoder.leave_out_backbone()
    with pytest.raises(ValueError, match="has to come from a Hub id or package:NAME/FOLDER"):
        encoder.leave_out_backbone(gpt2)
    scratch = LDLMTokenEncoder.from_backbone(gpt2, representation="scratch")
    with pytest.raises(ValueError, match="representation='scratch'"):
        scratch.leave_out_backbone("openai-community/gpt2")


def test_another_language_model_is_refused(packaged: str, random_tokens: Callable, tmp_path: Path) -> None:
    encoder = fitted(LDLMTokenEncoder.from_backbone(packaged), random_tokens)
    encoder.leave_out_backbone()
    encoder.save_pretrained(tmp_path / "saved")
    changed = fitted(LDLMTokenEncoder.from_backbone(packaged), random_tokens)
    next(changed.backbone.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="has another backbone.* than this token encoder"):
        changed.leave_out_backbone()
    assert changed.config.backbone_stored

    config_file = tmp_path / "saved" / "config.json"
    config = json.loads(config_file.read_text())
    for changes, match in (
        ({"vocab_size": 41}, "has vocab_size=40, and this token encoder was made from one with 41"),
        ({"hidden_size": 33}, "the weights are `mean` and `std` of shape"),
        ({"backbone_source": "package:tiny_language_model/../../elsewhere"}, "has to come from a Hub id or package"),
        ({"backbone_source": str(tmp_path)}, "has to come from a Hub id or package"),
    ):
        config_file.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=match):
            LDLMTokenEncoder.from_pretrained(tmp_path / "saved")
    config_file.write_text(json.dumps(config | {"backbone_source": "package:not_installed/model"}))
    with pytest.raises(OSError, match="which is not installed.*token_encoder=None"):
        LDLMTokenEncoder.from_pretrained(tmp_path / "saved")
