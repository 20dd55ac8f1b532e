"""What texts without a condition were before models could be given a part of them, they are still."""

from __future__ import annotations

import torch

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TangentDDIMScheduler,
)


# drawn once, in float32 on a CPU, by the version that knew no conditions: entries [0, 0, :4] of the clean latents
LATENTS = [-2.342446804046631, 3.4178199768066406, -2.2784881591796875, 0.55772465467453]
TOKENS = [[45, 36, 13, 25, 31, 21]] * 2


def counted(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that every version and machine has: sines of their places."""
    place = 0
    with torch.no_grad():
        for parameter in module.parameters():
            places = torch.arange(place, place + parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.2 * torch.sin(places * 12.9898)).view_as(parameter))
            place += parameter.numel()
    return module.eval()


def build() -> LDLMPipeline:
    layers = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    transformer = LDLMTransformer1DModel(
        in_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=12, sample_size=6
    )
    latent_decoder = LDLMLatentDecoderConfig(
        **layers, sequence_length=6, num_latents=6, latent_size=8, token_hidden_size=16
    )
    token_decoder = LDLMTokenDecoderConfig(**layers, vocab_size=50, token_hidden_size=16)
    pipe = LDLMPipeline(
        counted(transformer),
        counted(LDLMLatentDecoder(latent_decoder)),
        counted(LDLMTokenDecoder(token_decoder)),
        None,
        TangentDDIMScheduler(eta=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_texts_without_a_condition() -> None:
    """Guided by the self-condition and with noise in each step, so that every part of the loop counts."""
    noise = torch.sin(torch.arange(2 * 6 * 8).view(2, 6, 8) * 78.233)
    output = build()(
        batch_size=2,
        num_inference_steps=5,
        latents=noise,
        self_condition_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="seq",
    )
    torch.testing.assert_close(output.latents[0, 0, :4], torch.tensor(LATENTS), rtol=1e-5, atol=1e-6)
    assert output.sequences.tolist() == TOKENS
