"""What the trained models of transformers share: their attention, and which outputs they have."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..loading.safe_loading import SafeLoadingMixin


class LDLMPreTrainedModel(SafeLoadingMixin, PreTrainedModel):
    """The base of latent encoder, latent decoder and token decoder."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: {type(self).__name__} has one attention, torch's "
                "scaled_dot_product_attention ('sdpa'), which gives no weights away; leave it out, and "
                "output_attentions, which asks for 'eager'."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def check_outputs(self) -> None:
        """Raises ValueError where the configuration asks for outputs that these models do not have."""
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                raise ValueError(
                    f"config.{name}=True: {type(self).__name__} gives its result alone; set it to False. Forward "
                    "hooks on its layers see what lies between."
                )
