"""Likelihood of held-out text under the bound of Appendix A.1 (Eq. 6–23), each term by itself.

All terms are in nats a sequence. Two densities of A.1 carry settings that training drops: the encoder's noise s_enc
(Eq. 7) and the hidden-state likelihood's s_dec (Eq. 9). `docs/likelihood.md` has the derivation, and says what the
numbers can be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..loading.checks import check_settings
from ..models.latent_decoder import LDLMLatentDecoder
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_decoder import LDLMTokenDecoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers import tangent
from ..schedulers.scheduling_tangent_euler_maruyama import TangentEulerMaruyamaScheduler
from .draws import normal_like
from .reconstruction import token_cross_entropy


# (noisy latents (B, ...), timesteps (B,), self-condition or None) → clean latents
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class LikelihoodSettings:
    """What A.1 leaves open, and the bound depends on.

    Attributes:
        encoder_noise: s_enc of the relaxed encoder q(z|w) = N(E(h), s_enc^2 I) (Eq. 7); positive, since without noise
            the encoder's divergence from any continuous prior is infinite (Eq. 6).
        decoder_noise: delta of the corruption r(z~|z) = N(z, delta^2 I) (Eq. 8).
        hidden_noise: s_dec of p(h|z~) = N(D(z~), s_dec^2 I) (Eq. 9); None leaves the hidden states out, for the bound
            on the tokens alone.
        end_time: where the prior's reverse process ends and the clean latents are predicted, as sampling does at
            t_min. Before t_s, the time at which z_t / alpha has the encoder's noise, it ends at t_s and predicts
            nothing, which is best for a perfect denoiser only.
        latent_noise: standard deviation of the error that the prior expects of that prediction.
        self_conditioning: give the denoiser its own first estimate at the same (z_t, t) instead of zeros. Either is a
            function of (z_t, t), so either has a reverse process and a bound of its own.
    """

    encoder_noise: float
    decoder_noise: float
    hidden_noise: float | None
    end_time: float = 0.0
    latent_noise: float = 1.0
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            encoder_noise="(0, inf)",
            decoder_noise="[0, inf)",
            hidden_noise="(0, inf)",
            end_time="[0, 1)",
            latent_noise="[0, inf)",
        )


def gaussian_draw(mean: torch.Tensor, std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A draw from N(mean, std^2 I): the relaxed encoder (Eq. 7) and the decoder's corruption (Eq. 8)."""
    return mean + std * normal_like(mean, generator)


def encoder_entropy(num_entries: int, encoder_noise: float) -> float:
    """Entropy of q(z|w), n/2 log(2 pi e s_enc^2) for n entries (Eq. 16)."""
    return num_entries / 2 * math.log(2 * math.pi * math.e * encoder_noise**2)


def hidden_nll(predicted: torch.Tensor, hidden_states: torch.Tensor, hidden_noise: float) -> torch.Tensor:
    """-log N(h; D(z~), s_dec^2 I), its normaliser included, of hidden states (B, L, D): (B,) float64 (Eq. 9, 17)."""
    num_entries = hidden_states[0].numel()
    squared_error = sum_of_squares(predicted, hidden_states)
    return squared_error / (2 * hidden_noise**2) + num_entries / 2 * math.log(2 * math.pi * hidden_noise**2)


def token_nll(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """-log p(w|z~) of the token ids (L,) of one sequence from logits (L, V): () float64 (Eq. 10, 18)."""
    return len(input_ids) * token_cross_entropy(logits[None], input_ids[None])[0].double()


def sum_of_squares(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """||prediction - target||^2 of each example (B, ...): (B,) float64."""
    return (prediction - target).double().square().flatten(1).sum(1)


def first_time(encoder_noise: float, d: float) -> float:
    """t_s, the time at which sigma / alpha = s_enc: there z_t / alpha has the law of q(z|w)."""
    log_snr = torch.tensor(-2 * math.log(encoder_noise), dtype=torch.float64)
    return float(tangent.timesteps_from_log_snr(log_snr, d))


def likelihood_weight(timesteps: torch.Tensor, d: float) -> torch.Tensor:
    """1/2 exp(lambda) (-d lambda/dt) = -SNR'/2, the weight of ||z - z^||^2 in the likelihood, float64 (Eq. 22)."""
    return -tangent.snr_slope(timesteps, d) / 2


def predict_clean_latents(
    denoiser: Denoiser,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: TangentEulerMaruyamaScheduler,
    self_conditioning: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The denoiser's z^(z_t, t) for a draw of z_t, from latents (B, ...) at times (B,)."""
    noisy_latents = scheduler.add_noise(latents, normal_like(latents, generator), timesteps)
    self_condition = denoiser(noisy_latents, timesteps, None) if self_conditioning else None
    return denoiser(noisy_latents, timesteps, self_condition)


def diffusion_integral(
    squared_errors: torch.Tensor, timesteps: torch.Tensor, densities: torch.Tensor, d: float
) -> torch.Tensor:
    """One draw each of the integral of -SNR'/2 ||z - z^(z_t, t)||^2 over time (Eq. 21), at times that were drawn with
    these densities: (B,) float64.
    """
    return (likelihood_weight(timesteps, d) / densities).to(squared_errors.device) * squared_errors


def last_step_kl(
    squared_errors: torch.Tensor, num_entries: int, snr: float, encoder_noise: float, latent_noise: float
) -> torch.Tensor:
    """Divergence of q(z|z_t, w) from p(z|z_t), the prior's last step from a time t > t_s: (B,) float64.

    Given z_t and clean latents E(h), z is Gaussian: E(h) + k (z_t / alpha - E(h)), variance s_enc^2 (1 - k), with
    k = s_enc^2 SNR. The prior knows E(h) as N(z^, latent_noise^2 I), which widens its variance by (1 - k)^2
    latent_noise^2. At t_s, k = 1 and nothing is left to pay. The squared errors are ||E(h) - z^||^2 at t.
    """
    remaining = max(1 - encoder_noise**2 * snr, 0.0)
    widening = 1 + remaining * latent_noise**2 / encoder_noise**2
    width = num_entries / 2 * (math.log(widening) + 1 / widening - 1)
    return width + remaining * squared_errors / (2 * encoder_noise**2 * widening)


def best_end_time(
    timesteps: torch.Tensor, mean_squared_errors: torch.Tensor, encoder_noise: float, d: float
) -> tuple[float, float]:
    """The time, of those given, at which the prior's process had best end, and the latent noise to expect there.

    Ending at t costs, an entry, 1/2 integral of the error over SNR from 0 to SNR(t), and the last step,
    1/2 log(1 + (1 - k) error / s_enc^2) with the notation of [`last_step_kl`]. A denoiser that copies what little
    noise leaves of its input never pays for the integral's far end; one that cannot had better end before it. The
    times (G,) increase in [t_s, 1).
    """
    errors = mean_squared_errors.double()
    snr = tangent.log_snr(timesteps, d).exp()
    # up from SNR 0, where the error is taken to be that of the last time
    widths = torch.diff(snr.flip(0), prepend=snr.new_zeros(1))
    heights = (errors.flip(0) + torch.cat([errors[-1:], errors.flip(0)[:-1]])) / 2
    integral = (widths * heights).cumsum(0).flip(0)
    remaining = (1 - encoder_noise**2 * snr).clamp(min=0)
    best = int(torch.argmin(integral + torch.log1p(remaining * errors / encoder_noise**2)))
    return float(timesteps[best]), math.sqrt(float(errors[best]))


def terminal_kl(latents: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """KL(N(alpha z, sigma^2 I) || N(0, I)) of latents (B, ...): (B,) float64, the prior's end at t = 1 (Eq. 21)."""
    num_entries = latents[0].numel()
    signal = alpha**2 * sum_of_squares(latents, torch.zeros_like(latents))
    return (signal + num_entries * (sigma**2 - 1 - 2 * math.log(sigma))) / 2


@dataclass
class LikelihoodTerms:
    """One draw of the bound's terms for each sequence, in nats: float64 of shape (B,).

    Attributes:
        hidden_reconstruction: -log p(h|z~) (Eq. 17); None where the hidden states are left out.
        token_reconstruction: -log p(w|z~) (Eq. 18).
        diffusion: the integral with the likelihood's weight (Eq. 21, 22).
        last_step: KL of the prior's last step, from the end time to z; 0 if that is t_s.
        terminal_kl: KL at t = 1 (Eq. 21).
        encoder_entropy: of q(z|w) (Eq. 16), the same for all.
    """

    hidden_reconstruction: torch.Tensor | None
    token_reconstruction: torch.Tensor
    diffusion: torch.Tensor
    last_step: torch.Tensor
    terminal_kl: torch.Tensor
    encoder_entropy: torch.Tensor

    @property
    def prior_cross_entropy(self) -> torch.Tensor:
        """Bound on -E_q log p(z) (Eq. 21): the integral, the process's two ends, and the entropy of q."""
        return self.diffusion + self.last_step + self.terminal_kl + self.encoder_entropy

    @property
    def rate(self) -> torch.Tensor:
        """Bound on KL(q(z|w) || p(z)) (Eq. 14)."""
        return self.prior_cross_entropy - self.encoder_entropy

    @property
    def tokens_only(self) -> torch.Tensor:
        """Bound on -log p(w): the model with its hidden states integrated out, which Eq. 11 lets one do."""
        return self.token_reconstruction + self.rate

    @property
    def total(self) -> torch.Tensor | None:
        """Bound on -log p(w, h) (Eq. 23)."""
        return None if self.hidden_reconstruction is None else self.hidden_reconstruction + self.tokens_only


@dataclass
class LikelihoodBound:
    r"""
    The negative ELBO of Appendix A.1 for trained components.

    Args:
        token_encoder: frozen and fitted.
        latent_encoder: E.
        latent_decoder: D; `None` where the token decoder reads latents (App. B.2), which have no hidden states.
        token_decoder: hidden states (or latents) → logits.
        transformer: the denoiser.
        scheduler: the noise process.
        settings: noise levels and self-conditioning.

    Raises:
        ValueError: a hidden-state term without a latent decoder.
    """

    token_encoder: LDLMTokenEncoder
    latent_encoder: LDLMLatentEncoder
    latent_decoder: LDLMLatentDecoder | None
    token_decoder: LDLMTokenDecoder
    transformer: LDLMTransformer1DModel
    scheduler: TangentEulerMaruyamaScheduler
    settings: LikelihoodSettings

    def __post_init__(self) -> None:
        if self.latent_decoder is None and self.settings.hidden_noise is not None:
            raise ValueError(
                f"hidden_noise={self.settings.hidden_noise} asks for the likelihood of hidden states, which needs a "
                "latent decoder, and a token decoder that reads latents has none: use hidden_noise=None, the bound on "
                "tokens alone."
            )

    @property
    def start(self) -> float:
        """Where the diffusion term's integral begins: the end time, or t_s if that is later."""
        return max(self.settings.end_time, first_time(self.settings.encoder_noise, self.scheduler.config.tangent_d))

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) → hidden states h (B, L, D) and latents E(h) (B, N, d_z), both float32."""
        hidden_states = self.token_encoder(input_ids, return_dict=True).hidden_states.float()
        output = self.latent_encoder(hidden_states.to(self.latent_encoder.dtype), return_dict=True)
        return hidden_states, output.latents.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """D(z~) (B, L, D) for z~ ~ r(z~|z), z ~ q(z|w); without a latent decoder z~ itself."""
        relaxed = gaussian_draw(latents, self.settings.encoder_noise, generator)
        corrupted = gaussian_draw(relaxed, self.settings.decoder_noise, generator)
        if self.latent_decoder is None:
            return corrupted
        return self.latent_decoder(corrupted.to(self.latent_decoder.dtype), return_dict=True).hidden_states

    def denoise(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, self_condition: torch.Tensor | None
    ) -> torch.Tensor:
        """The transformer's prediction of the clean latents, in float32."""
        dtype = self.transformer.dtype
        if self_condition is not None:
            self_condition = self_condition.to(dtype)
        return self.transformer(noisy_latents.to(dtype), timesteps, self_condition).sample.float()

    @torch.no_grad()
    def squared_errors(
        self, latents: torch.Tensor, timesteps: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """||z - z^(z_t, t)||^2 of latents (B, N, d_z) at times (B,): (B,) float64."""
        predicted = predict_clean_latents(
            self.denoise, latents, timesteps, self.scheduler, self.settings.self_conditioning, generator
        )
        return sum_of_squares(predicted, latents)

    @torch.no_grad()
    def draw(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        densities: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> LikelihoodTerms:
        """One draw of every term.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): token ids.
            hidden_states, latents: what [`~LikelihoodBound.encode`] makes of them.
            timesteps (`torch.Tensor` of shape `(B,)`): times in [`start`, 1], float64.
            densities (`torch.Tensor` of shape `(B,)`): density of the proposal that drew them.
            generator: source of all noise.
        """
        hidden, token = self.reconstruction(input_ids, hidden_states, latents, generator)
        errors = self.squared_errors(latents, timesteps, generator)
        diffusion = diffusion_integral(errors, timesteps, densities, self.scheduler.config.tangent_d)
        alpha, sigma = self.scheduler.marginal(torch.tensor(1.0, dtype=torch.float64))
        entropy = encoder_entropy(latents[0].numel(), self.settings.encoder_noise)
        return LikelihoodTerms(
            hidden_reconstruction=hidden,
            token_reconstruction=token,
            diffusion=diffusion,
            last_step=self.last_step(latents, generator),
            terminal_kl=terminal_kl(latents, float(alpha), float(sigma)),
            encoder_entropy=torch.full_like(diffusion, entropy),
        )

    def reconstruction(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Both reconstruction terms of one draw of z~, as in [`LikelihoodTerms`]."""
        predicted, noise = self.decode(latents, generator), self.settings.hidden_noise
        # one sequence at a time: the logits of a whole batch, (B, L, V), would dwarf everything else in memory
        tokens = [
            token_nll(self.token_decoder(one[None].to(self.token_decoder.dtype), return_dict=True).logits[0], ids)
            for one, ids in zip(predicted, input_ids, strict=True)
        ]
        return None if noise is None else hidden_nll(predicted, hidden_states, noise), torch.stack(tokens)

    def last_step(self, latents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The term of that name."""
        settings = self.settings
        if self.start != settings.end_time:
            return torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
        end = torch.full((len(latents),), self.start, dtype=torch.float64)
        errors = self.squared_errors(latents, end, generator)
        snr = float(tangent.log_snr(end[0], self.scheduler.config.tangent_d).exp())
        return last_step_kl(errors, latents[0].numel(), snr, settings.encoder_noise, settings.latent_noise)
