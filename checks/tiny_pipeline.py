"""A pipeline of random weights, which the checks of publishing and loading save, publish and load."""

from __future__ import annotations

import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

import ldlm_hf


def build_pipeline(seed: int = 0, width: int = 24, num_layers: int = 2, vocab_size: int = 40) -> ldlm_hf.LDLMPipeline:
    """All components, for texts of 8 tokens and 6 latents; weights that start at zero are given other values."""
    torch.manual_seed(seed)
    vocabulary = {f"w{index}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    layers = {"n_embd": width, "n_layer": num_layers, "n_head": 2, "n_positions": 16}
    backbone = GPT2Config(vocab_size=vocab_size, bos_token_id=1, eos_token_id=1, **layers)
    with tempfile.TemporaryDirectory() as folder:
        GPT2Model(backbone).save_pretrained(folder)
        token_encoder = ldlm_hf.LDLMTokenEncoder.from_backbone(folder)
    token_encoder.fit_statistics([torch.randint(vocab_size, (8, 8)) for _ in range(4)])
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "token_hidden_size": width,
    }
    latent_sizes = sizes | {"sequence_length": 8, "num_latents": 6, "latent_size": 16}
    pipeline = ldlm_hf.LDLMPipeline(
        transformer=ldlm_hf.LDLMTransformer1DModel(16, num_layers, 2, width // 2, sample_size=6),
        latent_decoder=ldlm_hf.LDLMLatentDecoder(ldlm_hf.LDLMLatentDecoderConfig(**latent_sizes)),
        token_decoder=ldlm_hf.LDLMTokenDecoder(ldlm_hf.LDLMTokenDecoderConfig(vocab_size=vocab_size, **sizes)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0"),
        scheduler=ldlm_hf.TangentEulerMaruyamaScheduler(),
        token_encoder=token_encoder,
        latent_encoder=ldlm_hf.LDLMLatentEncoder(ldlm_hf.LDLMLatentEncoderConfig(**latent_sizes)),
    )
    with torch.no_grad():
        for component in (pipeline.transformer, pipeline.latent_decoder, pipeline.token_decoder):
            for parameter in component.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return pipeline
