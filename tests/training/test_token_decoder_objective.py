from __future__ import annotations

import torch

from ldlm_hf.training.recipes.token_decoder import TokenDecoderObjective


def test_what_is_denoised_is_decoded(make_components, random_tokens):
    """At t = 0 there is no noise: the token decoder reads what the denoiser, from its own first estimate, predicts."""
    parts = make_components()
    objective = TokenDecoderObjective(**parts, decoder_noise=0.0)
    input_ids, times = random_tokens(), torch.zeros(len(random_tokens()))
    denoiser = parts["transformer"]
    with torch.no_grad():
        denoiser.proj_out.weight.normal_()
        hidden_states = parts["token_encoder"](input_ids).hidden_states
        latents = parts["latent_encoder"](hidden_states).latents
        predicted = denoiser(latents, times, denoiser(latents, times).sample).sample
        logits = parts["token_decoder"](parts["latent_decoder"](predicted).hidden_states).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
    found = objective(input_ids, timesteps=times)
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-5)
    assert abs(objective(input_ids).total.item() - expected.item()) > 1e-3
    found.total.backward()
    assert {n.split(".")[0] for n, p in objective.named_parameters() if p.grad is not None} == {"token_decoder"}
