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


def test_of_pairs_sources_are_encoded_without_their_targets(make_conditional_pipeline, random_tokens):
    """As in a pipeline's call, so that the token decoder learns to read what it will be given."""
    parts = {name: part for name, part in make_conditional_pipeline().components.items() if name != "tokenizer"}
    objective = TokenDecoderObjective(**parts, decoder_noise=0.0)
    decoded: list[torch.Tensor] = []
    parts["latent_decoder"].register_forward_pre_hook(lambda _, latents: decoded.append(latents[0]))
    told: list[dict[str, torch.Tensor]] = []
    parts["transformer"].register_forward_pre_hook(lambda _, __, keywords: told.append(keywords), with_kwargs=True)
    sources = random_tokens()
    given = torch.zeros_like(sources, dtype=torch.bool)
    given[:, :5] = True
    others = sources.clone()
    others[:, 5:] = sources[:, 5:].roll(1, 0)
    for rows in (sources, others):
        objective(rows, given=given)
    assert torch.equal(decoded[0][:, :5], decoded[1][:, :5]) and not torch.equal(decoded[0], decoded[1])
    objective(sources, given=given, timesteps=torch.full((len(sources),), 0.5))
    assert told and all(torch.equal(keywords["given"], given) for keywords in told)
