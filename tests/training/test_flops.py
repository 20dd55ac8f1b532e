"""The FLOP counter against counts by hand, and what a run's estimate makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldlm_hf import (
    DistillationObjective,
    JointObjective,
    JointObjectiveSettings,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTokenEncoder,
    TangentDDIMScheduler,
)
from ldlm_hf.training import flops
from ldlm_hf.training.recipes.distillation import METHODS, build_student
from ldlm_hf.training.recipes.token_decoder import TokenDecoderObjective
from ldlm_hf.training.settings import LoopSettings


# the sizes of `make_components`: L tokens, N latents, width and inner width of the layers, width of hidden states and
# latents, vocabulary
LENGTH, LATENTS, WIDTH, INNER, TOKEN_WIDTH, LATENT_WIDTH, VOCABULARY = 8, 6, 24, 48, 32, 16, 40


def product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """QK^T and PV"""
    return 2 * product(queries, width, keys)


def perceiver(context: int, queries: int) -> int:
    """Two layers, without the projections before and behind them."""
    layer = product(queries, WIDTH, 3 * WIDTH) + product(context, WIDTH, 2 * WIDTH) + product(queries, WIDTH, WIDTH)
    layer += attention(queries, context + queries, WIDTH) + 2 * product(queries, WIDTH, INNER)
    return 2 * layer


def by_hand() -> dict[str, tuple[int, int]]:
    """FLOPs of one example, forward and backward: twice the forward, less the gradients of inputs that need none."""
    read = LENGTH + 1  # a token before the text
    language_model = 2 * (12 * product(read, TOKEN_WIDTH, TOKEN_WIDTH) + attention(read, read, TOKEN_WIDTH) // 2)
    encoder_in = product(LENGTH, TOKEN_WIDTH, WIDTH)
    encoder = encoder_in + perceiver(LENGTH, LATENTS) + product(LATENTS, WIDTH, LATENT_WIDTH)
    decoder = product(LATENTS, LATENT_WIDTH, WIDTH) + perceiver(LATENTS, LENGTH) + product(LENGTH, WIDTH, TOKEN_WIDTH)
    token_decoder = product(LENGTH, TOKEN_WIDTH, WIDTH) + product(LENGTH, WIDTH, VOCABULARY)
    token_decoder += 4 * product(LENGTH, WIDTH, WIDTH) + attention(LENGTH, LENGTH, WIDTH)
    token_decoder += 3 * product(LENGTH, WIDTH, INNER)
    time_in = product(1, 256, WIDTH)
    block = product(1, WIDTH, 6 * WIDTH) + 12 * product(LATENTS, WIDTH, WIDTH) + attention(LATENTS, LATENTS, WIDTH)
    denoiser = time_in + product(1, WIDTH, WIDTH) + product(LATENTS, 2 * LATENT_WIDTH, WIDTH) + 2 * block
    denoiser += product(1, WIDTH, 2 * WIDTH) + product(LATENTS, WIDTH, LATENT_WIDTH)
    return {
        "token_encoder": (language_model, 0),
        "latent_encoder": (encoder, 2 * encoder - encoder_in),
        "latent_decoder": (decoder, 2 * decoder),
        # its input is detached
        "token_decoder": (token_decoder, 2 * token_decoder - product(LENGTH, TOKEN_WIDTH, WIDTH)),
        "transformer": (denoiser, 2 * denoiser - time_in),
    }


def counted(objective: nn.Module) -> dict[str, flops.PartFlops]:
    """FLOPs of one example."""
    passed = flops.count_flops(objective, LENGTH)
    examples = passed.num_tokens // LENGTH
    return {
        part.name: flops.PartFlops(
            part.name, part.forward / examples, part.backward / examples, part.recomputed / examples
        )
        for part in passed.parts
    }


def test_joint_objective(make_components: Callable) -> None:
    settings = JointObjectiveSettings(self_conditioning_probability=0.25)
    parts = counted(JointObjective(**make_components(), settings=settings))
    extra = parts.pop("transformer, no gradients")
    assert {name: (part.forward, part.backward) for name, part in parts.items()} == by_hand()
    assert (extra.forward, extra.backward) == (0.25 * parts["transformer"].forward, 0)
    assert not any(part.recomputed for part in parts.values())


@pytest.mark.parametrize("self_condition_scale", [1.5, 0.0])
def test_passes_of_teacher_and_student_without_gradients(
    make_components: Callable, self_condition_scale: float
) -> None:
    parts = make_components()
    encoders, teacher = (parts["token_encoder"], parts["latent_encoder"]), parts["transformer"]
    passes = {}
    for method in METHODS:
        student = build_student(teacher, method)
        objective = DistillationObjective(*encoders, student, teacher, TangentDDIMScheduler(), self_condition_scale)
        passes[method] = counted(objective)
    # two steps of the teacher's, or of the student's own
    teacher_forward = by_hand()["transformer"][0]
    assert passes["progressive"]["teacher"].forward == (4 if self_condition_scale else 2) * teacher_forward
    assert "teacher" not in passes["flow_map"]
    trained_once = passes["progressive"]["transformer"]
    assert "transformer, no gradients" not in passes["progressive"]
    assert passes["flow_map"]["transformer, no gradients"].forward > 1.9 * trained_once.forward
    assert trained_once.backward < passes["flow_map"]["transformer"].backward < 1.1 * trained_once.backward


def test_variants(make_components: Callable) -> None:
    components = make_components()
    plain = JointObjectiveSettings(self_conditioning_probability=0.0)
    parts = counted(JointObjective(**components, settings=plain))
    assert "transformer, no gradients" not in parts

    # the token loss on half of the examples
    shared = counted(JointObjective(**components, settings=replace(plain, token_share=0.5)))
    assert 2 * shared["token_decoder"].forward == parts["token_decoder"].forward
    # its gradient goes on to the latents, through the first projection of the token decoder
    token_loss = counted(JointObjective(**components, settings=replace(plain, reconstruction="hidden+token")))
    more = token_loss["token_decoder"].backward - parts["token_decoder"].backward
    assert more == product(LENGTH, TOKEN_WIDTH, WIDTH)

    without_token_decoder = counted(JointObjective(**components | {"token_decoder": None}, settings=plain))
    assert without_token_decoder == {name: part for name, part in parts.items() if name != "token_decoder"}


def test_an_autoencoder_of_masked_text_reads_it_twice(make_components: Callable) -> None:
    settings = JointObjectiveSettings(token_masking=0.3, mask_token_id=1, reconstruction="hidden+token")
    components = make_components() | {"transformer": None}
    parts = counted(JointObjective(**components, settings=settings, stage="autoencoder"))
    assert parts["token_encoder"].forward == 2 * by_hand()["token_encoder"][0]
    assert "transformer" not in parts


def test_gradient_checkpointing_is_told_apart(make_components: Callable) -> None:
    objective = JointObjective(**make_components())
    plain = flops.count_flops(objective, LENGTH)
    objective.transformer.enable_gradient_checkpointing()
    objective.latent_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert flops.count_flops(objective, LENGTH).per_token == plain.per_token
    parts = counted(objective)
    outside_blocks = product(LATENTS, 2 * LATENT_WIDTH, WIDTH) + product(LATENTS, WIDTH, LATENT_WIDTH)
    outside_blocks += product(1, 256, WIDTH) + 3 * product(1, WIDTH, WIDTH)
    assert parts["transformer"].recomputed == parts["transformer"].forward - outside_blocks
    # no gradient needs what the last product of a layer gives, so it is left out
    last_products = 2 * product(LATENTS, INNER, WIDTH)
    assert parts["latent_encoder"].recomputed == perceiver(LENGTH, LATENTS) - last_products
    assert not parts["latent_decoder"].recomputed
    assert objective.transformer.gradient_checkpointing, "the objective itself is left as it is"


@pytest.mark.parametrize("reads", ["hidden_states", "latents"])
def test_token_decoder_objective(make_components: Callable, reads: str) -> None:
    components = make_components()
    del components["transformer"], components["scheduler"]
    if reads == "latents":
        sizes = components["latent_encoder"].config.to_diff_dict() | {"num_latents": LENGTH}
        components["latent_encoder"] = LDLMLatentEncoder(LDLMLatentEncoderConfig(**sizes))
        components["latent_decoder"] = None
        sizes = components["token_decoder"].config.to_diff_dict() | {"token_hidden_size": LATENT_WIDTH}
        components["token_decoder"] = LDLMTokenDecoder(LDLMTokenDecoderConfig(**sizes))
    parts = counted(TokenDecoderObjective(**components, decoder_noise=1.0))
    expected = by_hand()
    frozen = {"token_encoder": expected["token_encoder"][0]}
    if reads == "hidden_states":
        frozen |= {name: expected[name][0] for name in ("latent_encoder", "latent_decoder")}
        trained = expected["token_decoder"]
    else:
        encoder_in, encoder_out = product(LENGTH, TOKEN_WIDTH, WIDTH), product(LENGTH, WIDTH, LATENT_WIDTH)
        frozen["latent_encoder"] = encoder_in + perceiver(LENGTH, LENGTH) + encoder_out
        narrower = product(LENGTH, TOKEN_WIDTH, WIDTH) - product(LENGTH, LATENT_WIDTH, WIDTH)
        trained = (expected["token_decoder"][0] - narrower, expected["token_decoder"][1] - narrower)
    assert {name: (part.forward, part.backward) for name, part in parts.items()} == {
        **{name: (forward, 0) for name, forward in frozen.items()},
        "token_decoder": trained,
    }


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_language_models(backbone_folders: dict[str, Path], make_components: Callable, family: str) -> None:
    token_encoder = LDLMTokenEncoder.from_backbone(str(backbone_folders[family]), prefix=False)
    token_encoder.config.num_statistics_tokens = 1
    weights = sum(
        parameter.numel()
        for name, parameter in token_encoder.backbone.named_parameters()
        if parameter.ndim == 2 and not name.startswith(("wte", "wpe", "embed"))
    )
    scores = 2 * attention(LENGTH, LENGTH, TOKEN_WIDTH)  # of the two blocks that are kept
    parts = counted(JointObjective(**make_components() | {"token_encoder": token_encoder}))
    assert parts["token_encoder"].forward == 2 * LENGTH * weights + (scores if family == "bert" else scores // 2)


def test_counting_leaves_no_trace(make_components: Callable) -> None:
    objective = JointObjective(**make_components())
    before = {name: parameter.clone() for name, parameter in objective.named_parameters()}
    language_model = objective.token_encoder.backbone
    attention_before, random_state = language_model.config._attn_implementation, torch.get_rng_state()
    flops.count_flops(objective, LENGTH)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, parameter in objective.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in objective.modules())
    assert language_model.config._attn_implementation == attention_before
    assert objective.settings.self_conditioning_probability == 0.5


def test_the_count_is_that_of_torchs_own_counter(make_components: Callable) -> None:
    """On real tensors and through the whole backward pass; the language model's causal attention is left out, since
    torch counts it in full."""
    objective = JointObjective(**make_components(representation="embedding"))
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(**objective.example_inputs(4, LENGTH)).total.backward()
    assert flops.count_flops(objective, LENGTH).per_token == pytest.approx(
        counter.get_total_flops() / (4 * LENGTH), rel=0.01
    )


def test_the_papers_geometry(repository: Path, run_script: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    """training/benchmark.py executed 4.61 TFLOP for 2,048 tokens, where both of its two examples drew
    self-conditioning; and the paper's 5 days on 64 A100 are the share of the peak that the summary calls the paper's.
    """
    config = repository / "training" / "configs" / "openwebtext_1024.yaml"
    devices = ("--device_name", "NVIDIA A100-SXM4-80GB", "--num_devices", "64")
    run_script("flops", "--config", str(config), *devices)
    printed = capsys.readouterr().out
    rows = {cells[1].strip(): cells for line in printed.splitlines() if (cells := line.split("|"))[0] != line}
    extra, all_parts = (float(rows[name][5]) for name in ("transformer, no gradients", "all"))
    assert 2048 * (all_parts + extra) / 1e6 == pytest.approx(4.614, abs=1e-3)
    utilization = all_parts * 1e6 * 524288 * 1e6 / (5 * 86400 * 64 * 312e12)
    assert utilization == pytest.approx(flops.PAPER_UTILIZATION, abs=0.005)
    assert {"token_encoder", "latent_encoder", "latent_decoder", "token_decoder", "transformer"} < rows.keys()
    for number in (
        "2.148 GFLOP a token",
        "64 x 312 TFLOP/s",
        "524,288 tokens",
        "39.2 hours at 40%",
        "5.0 days at 13%",
    ):
        assert number in printed


def test_command_errors(run_script: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_script("flops", "--device_name", "Voodoo 2")
    assert "'Voodoo 2'" in capsys.readouterr().err
    with pytest.raises(OSError, match="--backbone_config"):
        run_script("flops", "model.backbone=/nowhere")
    with pytest.raises(ValueError, match="model_type"):
        run_script("flops", "--backbone_config", "{n_layer: 2}")


def test_command_with_given_sizes(run_script: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    """A backbone that cannot be reached, gradient checkpointing, and the peak that the settings give."""
    layers = "hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2"
    overrides = [f"model.{name}={{{layers}}}" for name in ("latent_encoder", "latent_decoder", "token_decoder")]
    overrides += ["model.transformer={num_layers: 1, num_attention_heads: 2, attention_head_dim: 12}"]
    overrides += ["model.backbone=org/private", "model.sequence_length=16", "loop.device_batch_size=4"]
    overrides += ["loop.gradient_checkpointing=true", "loop.mixed_precision=no", "loop.peak_tflops=0.5"]
    backbone = "{model_type: gpt2, n_embd: 32, n_layer: 4, n_head: 2, vocab_size: 96}"
    run_script("flops", "--backbone_config", backbone, *overrides)
    printed = capsys.readouterr().out
    assert "gradient checkpointing computes" in printed
    assert "1 x 500 GFLOP/s (loop.peak_tflops)" in printed


@pytest.mark.parametrize(
    ("device_name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H20", "bf16", None),
    ],
)
def test_data_sheets(device_name: str, precision: str, tflops: float | None) -> None:
    peak = flops.data_sheet_peak(device_name, precision)
    assert (peak and peak.flops_per_second) == (tflops and tflops * 1e12)
    assert peak is None or "data sheet" in peak.source


@pytest.mark.parametrize(("mixed_precision", "name"), [("no", "float32"), ("bf16", "bfloat16")])
def test_measured_peak(mixed_precision: str, name: str) -> None:
    random_state = torch.get_rng_state()
    peak = flops.device_peak(torch.device("cpu"), mixed_precision)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert peak.flops_per_second > 0
    assert peak.source.startswith("measured") and name in peak.source


def test_given_peak() -> None:
    assert flops.device_peak(torch.device("cpu"), "bf16", 312.0) == flops.DevicePeak(312e12, "loop.peak_tflops")
    with pytest.raises(ValueError, match="peak_tflops=0 must lie in"):
        LoopSettings(peak_tflops=0)


def test_run_estimate() -> None:
    part = flops.PartFlops("all", forward=1e12, backward=2e12, recomputed=1e12)
    estimate = flops.RunEstimate(
        pass_flops=flops.PassFlops((part,), num_tokens=1000),
        tokens_per_step=10_000,
        max_steps=100,
        peak=flops.DevicePeak(1e14, "a table"),
        num_devices=3,
    )
    assert estimate.pass_flops.per_token == 3e9
    # what is computed twice is no use
    assert estimate.model_flops_utilization(tokens_per_second=1e4) == pytest.approx(0.1)
    assert estimate.seconds_at(0.1) == pytest.approx(100)
    summary = estimate.summary()
    for text in ("3 GFLOP a token", "30 TFLOP a step", "3e+15 FLOP in 100 steps (1M tokens)", "computes 1 GFLOP"):
        assert text in summary
    assert "300 TFLOP/s, 3 x 100 TFLOP/s (a table)" in summary
    assert "25.0 seconds at 40%" in summary


def test_run_estimate_of_an_objective(make_components: Callable) -> None:
    objective = JointObjective(**make_components())
    loop = LoopSettings(batch_size=12, max_steps=5)
    peak = flops.DevicePeak(1e9, "a table")
    estimate = flops.estimate_run(objective, loop, LENGTH, num_devices=2, peak=peak)
    assert (estimate.tokens_per_step, estimate.max_steps, estimate.peak_of_all) == (12 * LENGTH, 5, 2e9)
    assert estimate.pass_flops == flops.count_flops(objective, LENGTH)
