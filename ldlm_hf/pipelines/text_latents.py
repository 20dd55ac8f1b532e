"""Texts to latents and back: the parts of the pipeline that need no denoiser."""

from __future__ import annotations

import math
import reprlib

import torch

from ..loading.checks import check_settings
from ..loading.repository import RepositoryPipeline
from .prompts import as_texts, cut_rows


class TextLatentPipeline(RepositoryPipeline):
    """The components, and the ways between texts, token ids and latents."""

    max_vocab_padding = 1024  # ours; language models pad theirs by up to 905 (Phi-2)
    max_decoded_positions = 4096  # latents that are decoded at once, or one sample's

    def check_components(self) -> None:
        """Raises ValueError where tokenizer, decoders and denoiser do not fit each other."""
        if self.token_decoder is None:
            return
        vocab_size = self.token_decoder.config.vocab_size
        # vocabularies of models are often padded to a round number, so the tokenizer may have somewhat fewer tokens
        if self.tokenizer is not None and not vocab_size - self.max_vocab_padding <= len(self.tokenizer) <= vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but the token decoder's vocab_size is {vocab_size}; "
                "use the tokenizer that the token decoder was trained with."
            )
        read_size = self.token_decoder.config.token_hidden_size
        if self.latent_decoder is not None and self.latent_decoder.config.token_hidden_size != read_size:
            raise ValueError(
                f"The latent decoder's token_hidden_size={self.latent_decoder.config.token_hidden_size} differs "
                f"from the token decoder's, {read_size}; a token decoder that reads latents goes with "
                "latent_decoder=None."
            )
        if self.transformer is None:
            return
        num_latents, decoded_size = self.decoded_shape
        if num_latents not in (None, self.transformer.config.sample_size):
            raise ValueError(
                f"The latent decoder's num_latents={num_latents} differs from the transformer's "
                f"sample_size={self.transformer.config.sample_size}."
            )
        channels = self.transformer.config.in_channels
        if decoded_size != channels:
            raise ValueError(
                f"The transformer's in_channels={channels} differs from the {decoded_size} that the decoder reads "
                "(latent decoder latent_size, or token decoder token_hidden_size without a latent decoder)."
            )

    @property
    def sequence_length(self) -> int:
        """Tokens L of a generated text."""
        if self.latent_decoder is None:
            # a token decoder that reads latents has a token for each
            return self.transformer.config.sample_size
        return self.latent_decoder.config.sequence_length

    @property
    def decoded_shape(self) -> tuple[int | None, int]:
        """Number N and width d_z of the latents that are decoded; a token decoder that reads latents itself takes any
        number of them.
        """
        if self.latent_decoder is None:
            return None, self.token_decoder.config.token_hidden_size
        return self.latent_decoder.config.num_latents, self.latent_decoder.config.latent_size

    def require_components(self, caller: str, *names: str) -> None:
        """Raises ValueError, naming them, where components are missing that a method needs."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{caller} needs the components {', '.join(names)}; this pipeline lacks {' and '.join(missing)}. Pass "
                "what is missing to from_pretrained or to the constructor."
            )

    def cut_rows(self, sequences: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Token ids (B, L) cut to the rows' own lengths: (B, T), shorter rows filled up with the end-of-text token."""
        return cut_rows(sequences, lengths, self.fill_token_id or 0)

    def pad_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids (B, T) of rows, shorter ones filled up with the end-of-text token."""
        longest = max(map(len, rows))
        return torch.tensor([row + [self.fill_token_id or 0] * (longest - len(row)) for row in rows])

    @property
    def fill_token_id(self) -> int | None:
        """What stands behind the end of a text: the end-of-text token, or a separator; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        end = self.tokenizer.eos_token_id
        return self.tokenizer.sep_token_id if end is None else end

    @torch.no_grad()
    def decode_to_sequences(self, latents: torch.Tensor) -> torch.Tensor:
        """Maps clean latents (B, N, d_z) to their most likely token ids (B, L); for use in callbacks, too."""
        self.require_components("decoding", "token_decoder")
        # a large batch in parts: the decoders' layers would need more memory for all of it than the denoiser's do
        parts = latents.split(max(1, self.max_decoded_positions // latents.shape[1]))
        return torch.cat([self._decode_part_to_sequences(part) for part in parts])

    def _decode_part_to_sequences(self, latents: torch.Tensor) -> torch.Tensor:
        if self.latent_decoder is None:
            hidden_states = latents
        else:
            latents = latents.to(self.latent_decoder.dtype)
            hidden_states = self.latent_decoder(latents, return_dict=True).hidden_states  # (B, L, D)
        return self.token_decoder.most_likely_tokens(hidden_states.to(self.token_decoder.dtype))

    def _to_texts(
        self, sequences: torch.Tensor | list[list[int]], ends_of_given: list[int] | None = None
    ) -> list[str]:
        """Token ids (B, L) → texts, without special tokens; of pairs the targets alone. A text ends at its first
        end-of-text token from the place in `ends_of_given` on (0 by default), where the pipeline's texts end at one.
        """
        source_length = self.config.source_length or 0
        if self.config.ends_texts or source_length:
            rows = sequences.tolist() if isinstance(sequences, torch.Tensor) else sequences
            starts = [max(end, source_length) for end in ends_of_given or [0] * len(rows)]
            sequences = [self.up_to_end(row, start)[source_length:] for row, start in zip(rows, starts, strict=True)]
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)

    def up_to_end(self, row: list[int], start: int) -> list[int]:
        """The tokens of a text before the first end-of-text token from `start` on, where texts end at one."""
        end = self.fill_token_id
        return row[: row.index(end, start)] if end is not None and self.is_over(row[start:]) else row

    def is_over(self, written: list[int]) -> bool:
        """Whether a text ends within tokens that were written of it."""
        return self.config.ends_texts and self.fill_token_id in written

    def _register_texts(self, ends_texts: bool, source_length: int | None) -> None:
        """Makes what kind of texts the model was trained on a part of the pipeline's configuration."""
        has_length = self.latent_decoder is not None or self.transformer is not None
        length = self.sequence_length if has_length else math.inf
        values = {"ends_texts": ends_texts, "source_length": source_length}
        check_settings(type(self).__init__, values, source_length=f"[1, {length})")
        self.register_to_config(**values)

    @torch.no_grad()
    def encode(self, texts: str | list[str]) -> torch.Tensor:
        """Maps texts to latents (B, N, d_z), float32.

        The models know full sequences only: a text that is shorter than the model's sequence length is followed by
        end-of-text tokens, as documents are in training.

        Args:
            texts: a text, or a list of them.

        Raises:
            ValueError: a pipeline without encoders or tokenizer, no text, or a text longer than the model's sequence
                length.
        """
        self.require_components("encode", "tokenizer", "token_encoder", "latent_encoder")
        rows = self.tokenizer(as_texts("texts", texts), add_special_tokens=False, verbose=False)["input_ids"]
        return self.encode_sequences(self.fill_rows(rows))

    @torch.no_grad()
    def encode_sequences(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps token ids (B, L) to latents (B, N, d_z), float32; L is the model's sequence length.

        A mask (B, L, L) says which tokens each of them may attend to.

        Raises:
            ValueError: a pipeline without encoders, or token ids of another shape.
        """
        self.require_components("encode_sequences", "token_encoder", "latent_encoder")
        length = self.latent_encoder.config.sequence_length
        if sequences.ndim != 2 or sequences.shape[1] != length:
            raise ValueError(
                f"`sequences` of shape {tuple(sequences.shape)} must have the shape (batch_size, sequence_length) = "
                f"(batch_size, {length})."
            )
        sequences = sequences.to(self._execution_device)
        encoded = self.token_encoder(sequences, attention_mask=attention_mask, return_dict=True)
        hidden_states = encoded.hidden_states.to(self.latent_encoder.dtype)
        latents = self.latent_encoder(hidden_states, attention_mask=attention_mask, return_dict=True).latents.float()
        self.maybe_free_model_hooks()
        return latents

    @property
    def missing_encoders(self) -> list[str]:
        """Which of the optional components that [`~LDLMPipeline.encode`] needs are not there."""
        return [name for name in ("token_encoder", "latent_encoder") if getattr(self, name) is None]

    def fill_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids (B, L) of texts, each filled up with end-of-text tokens; ValueError for one that is too long."""
        fill, sequence_length = self.fill_token_id, self.latent_encoder.config.sequence_length
        for i, row in enumerate(rows):
            if len(row) > sequence_length:
                raise ValueError(
                    f"`texts[{i}]` has {len(row)} tokens, more than the model's sequence_length of {sequence_length}; "
                    "shorten it."
                )
            if len(row) < sequence_length and fill is None:
                raise ValueError(
                    f"`texts[{i}]` has {len(row)} tokens, fewer than the model's sequence_length of "
                    f"{sequence_length}, and the tokenizer has neither an end-of-text nor a separator token to fill "
                    "it up with."
                )
        return torch.tensor([row + [fill] * (sequence_length - len(row)) for row in rows], dtype=torch.long)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[str]:
        """Maps clean latents (B, N, d_z) to texts; the inverse of [`~LDLMPipeline.encode`] as far as it was learned,
        and of pairs to the targets alone.

        Raises:
            ValueError: latents whose shape is not the model's, or a pipeline without token decoder or tokenizer.
        """
        self.require_components("decode", "token_decoder", "tokenizer")
        num_latents, latent_size = self.decoded_shape
        if num_latents is None and self.transformer is not None:
            num_latents = self.transformer.config.sample_size
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"`latents` must be a tensor, as `encode` returns it, got {reprlib.repr(latents)}.")
        if latents.ndim != 3 or latents.shape[2] != latent_size or num_latents not in (None, latents.shape[1]):
            raise ValueError(
                f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, num_latents, "
                f"latent_size) = (batch_size, {num_latents or 'num_latents'}, {latent_size})."
            )
        texts = self._to_texts(self.decode_to_sequences(latents.to(self._execution_device)))
        self.maybe_free_model_hooks()
        return texts
