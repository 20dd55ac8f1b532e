"""Word embeddings that start from those of a pretrained language model."""

from __future__ import annotations

import torch

from ..models.token_encoder import LDLMTokenEncoder


@torch.no_grad()
def start_from_backbone(words: torch.Tensor, backbone: str) -> None:
    """Gives word embeddings (K, D) the values of a backbone's, their common mean taken off.

    Raises:
        ValueError: embeddings of another width, or fewer of them.
    """
    embeddings = LDLMTokenEncoder.from_backbone(backbone, representation="embedding").embedding.weight
    if embeddings.shape[1] != words.shape[1] or len(embeddings) < len(words):
        raise ValueError(
            f"model.embeddings_from_backbone=true: the embeddings of {backbone!r} have the shape "
            f"{tuple(embeddings.shape)}, and the model's {tuple(words.shape)}; set model.hidden_size="
            f"{embeddings.shape[1]}."
        )
    words.copy_(embeddings[: len(words)] - embeddings.mean(0))
