"""The autoregressive language model: GPT-2 of transformers, trained on the same text, tokens and compute.

A text of L tokens x_1 ... x_L is written from the left, each token drawn from p(x_i | x_0, ..., x_{i-1}); x_0 is a
start token (BOS, or a BERT-type tokenizer's CLS, or end-of-text). The loss is the mean of -log p over the L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, Cache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from ..data import DataSettings
from ..loading.checks import check_settings
from ..loading.pretrained_sources import resolve_pretrained_source
from ..loading.repository import RepositoryPipeline
from ..objective.base import Objective
from ..objective.reconstruction import token_cross_entropy
from ..pipelines.pipeline_output import LDLMPipelineOutput
from ..pipelines.prompts import as_texts, tokenize
from ..pipelines.sampling import check_counts
from ..training.randomness import RowRandomness
from ..training.recipe import Evaluation, PipelineRecipe, StepLosses
from ..training.settings import EvaluationSettings, LoopSettings, OptimizerSettings, check_decay
from .backbone_embeddings import start_from_backbone
from .categorical import Generators, draw, row_generators, uniform_like, word_probabilities


# 1. Sampling


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before each text; ValueError for a tokenizer with none of the tokens that could."""
    for name in ("bos_token_id", "cls_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError(
        f"{type(tokenizer).__name__} has no BOS, CLS or end-of-text token to put before a text: set one on it."
    )


def draw_tokens(logits: torch.Tensor, temperature: float, top_p: float, generators: Generators) -> torch.Tensor:
    """One token id for each row of logits (B, V), from softmax(logits / temperature), cut to the most likely tokens
    that together have a probability of `top_p`; the most likely one at temperature 0. Each row has a generator."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(word_probabilities(logits, temperature, top_p), uniform_like(logits[:, 0], generators))


class AutoregressivePipeline(RepositoryPipeline):
    r"""
    Pipeline for text generation with an autoregressive language model, which is called like [`LDLMPipeline`].

    Args:
        language_model ([`~transformers.GPT2LMHeadModel`]): p(x_i | tokens before).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of its vocabulary.
        sequence_length (`int`): tokens L of a text; as many as the model has positions by default.
    """

    saved_settings = ("sequence_length",)

    def __init__(
        self,
        language_model: GPT2LMHeadModel,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int | None = None,
    ):
        super().__init__()
        self.register_modules(language_model=language_model, tokenizer=tokenizer)
        longest = language_model.config.n_positions
        self.register_to_config(sequence_length=longest if sequence_length is None else int(sequence_length))
        if not 1 <= self.sequence_length <= longest:
            raise ValueError(
                f"sequence_length={sequence_length} must lie between 1 and the model's {longest} positions."
            )
        self.num_function_evaluations = 0

    @property
    def sequence_length(self) -> int:
        """Tokens L of a text."""
        return self.config.sequence_length

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        batch_size: int = 1,
        num_texts_per_prompt: int = 1,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_ids: torch.Tensor | None = None,
        output_type: str = "text",
        return_dict: bool = True,
    ) -> LDLMPipelineOutput | tuple:
        r"""
        Generates texts, or continues prompts.

        Args:
            prompt: what texts begin with.
            batch_size: number of texts, without a prompt.
            num_texts_per_prompt: texts for each prompt, one behind the other.
            max_new_tokens: tokens that are written; by default as many as a text has room for.
            temperature: that logits are divided by; 0 takes the most likely token.
            top_p: probability, in (0, 1], of the most likely tokens that are drawn from.
            generator: source of all noise; a list gives each text its own stream.
            prompt_ids (`torch.LongTensor` of shape `(B, P)`): tokens that texts begin with, instead of prompts.
            output_type: `"text"`: texts and token ids; `"seq"`: token ids.
            return_dict: whether to return an [`LDLMPipelineOutput`] instead of a tuple `(sequences, texts)`.

        Raises:
            ValueError: an argument out of its range, prompts of different lengths, or one that leaves no room.
        """
        check_counts(batch_size=batch_size, num_texts_per_prompt=num_texts_per_prompt)
        if max_new_tokens is not None:
            check_counts(max_new_tokens=max_new_tokens)
        if (prompt is not None) + (prompt_ids is not None) + (batch_size != 1) > 1:
            raise ValueError("`prompt`, `prompt_ids` and `batch_size` each say how many texts there are: give one.")
        if prompt is None and num_texts_per_prompt != 1:
            raise ValueError(f"`num_texts_per_prompt`={num_texts_per_prompt} is for a `prompt`; use batch_size.")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` must be a finite number that is not negative, got {temperature!r}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be a number in (0, 1], got {top_p!r}.")
        if output_type not in ("text", "seq"):
            raise ValueError(f"`output_type` must be text or seq, got {output_type!r}.")
        if prompt is not None:
            rows = [tokenize(self.tokenizer, text, "prompt") for text in as_texts("prompt", prompt)]
            if len({len(row) for row in rows}) > 1:
                raise ValueError("`prompt` has texts of different numbers of tokens: give them one by one.")
            prompt_ids = torch.tensor(rows, dtype=torch.long).repeat_interleave(int(num_texts_per_prompt), dim=0)
        if prompt_ids is None:
            prompt_ids = torch.empty(batch_size, 0, dtype=torch.long)
        room = self.sequence_length - prompt_ids.shape[1]
        if room < (1 if max_new_tokens is None else max_new_tokens):
            raise ValueError(
                f"`prompt` has {prompt_ids.shape[1]} tokens, which leaves room for {room}: this model's texts have "
                f"{self.sequence_length}."
            )
        generators = generator if isinstance(generator, list) else [generator]
        if not all(one is None or isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        sources = row_generators(generator, len(prompt_ids))
        count = room if max_new_tokens is None else max_new_tokens
        sequences = self.write(prompt_ids.to(self._execution_device), count, temperature, top_p, sources)
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True) if output_type == "text" else None
        self.maybe_free_model_hooks()
        return LDLMPipelineOutput(sequences=sequences, texts=texts) if return_dict else (sequences, texts)

    def write(
        self,
        prompt_ids: torch.Tensor,
        count: int,
        temperature: float,
        top_p: float,
        generators: Generators,
    ) -> torch.Tensor:
        """Token ids (B, P) followed by `count` drawn ones: (B, P + count)."""
        start = prompt_ids.new_full((len(prompt_ids), 1), start_token_id(self.tokenizer))
        sequences, unread, cache = prompt_ids, torch.cat([start, prompt_ids], dim=1), None
        self.num_function_evaluations = 0
        with self.progress_bar(total=count) as progress_bar:
            for _ in range(count):
                unread, cache = self.write_next(unread, cache, temperature, top_p, generators)
                sequences = torch.cat([sequences, unread], dim=1)
                self.num_function_evaluations += 1
                progress_bar.update()
        return sequences

    def write_next(
        self,
        unread: torch.Tensor,
        cache: Cache | None,
        temperature: float,
        top_p: float,
        generators: Generators,
    ) -> tuple[torch.Tensor, Cache]:
        """The next token (B, 1), drawn after those that the model has read and `unread` ones (B, n); and the cache."""
        # by position: transformers 5.24 calls it otherwise than earlier versions
        output = self.language_model(unread, cache, use_cache=True, logits_to_keep=1)
        tokens = draw_tokens(output.logits[:, -1], temperature, top_p, generators)
        return tokens[:, None], output.past_key_values


# 2. Training


class AutoregressiveLosses(NamedTuple):
    """Mean cross-entropy in nats a token, and accuracy."""

    total: torch.Tensor
    accuracy: torch.Tensor


class AutoregressiveObjective(Objective):
    """-log p(x_i | tokens before) of token ids (B, L), the mean over all of them."""

    def __init__(self, language_model: GPT2LMHeadModel, start_id: int):
        super().__init__()
        self.language_model = language_model
        self.start_id = start_id

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """Arguments of `forward` for a batch of no particular text, to count what a pass costs."""
        return {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.long)}

    def forward(self, input_ids: torch.Tensor) -> AutoregressiveLosses:
        """Loss and accuracy on token ids (B, L)."""
        start = torch.full_like(input_ids[:, :1], self.start_id)
        logits = self.language_model(torch.cat([start, input_ids[:, :-1]], dim=1), use_cache=False).logits
        return AutoregressiveLosses(*token_cross_entropy(logits, input_ids))


@dataclass
class AutoregressiveModelSettings:
    """The language model.

    Attributes:
        backbone: model whose tokenizer it has: Hub id, folder, or `package:NAME/FOLDER`.
        sequence_length: tokens L.
        embeddings_from_backbone: start the word embeddings from the backbone's, which have to be as wide.
        hidden_size, num_layers, num_attention_heads: of the Transformer; GPT-2's by default.
        dropout: of embeddings, attention and residuals.
    """

    backbone: str = "openai-community/gpt2"
    sequence_length: int = 1024
    embeddings_from_backbone: bool = False
    hidden_size: int = 768
    num_layers: int = 12
    num_attention_heads: int = 12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = ("sequence_length", "hidden_size", "num_layers", "num_attention_heads")
        check_settings(type(self).__init__, vars(self), **dict.fromkeys(sizes, "[1, inf)"), dropout="[0, 1)")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}."
            )


@dataclass
class AutoregressiveSettings:
    """All settings of `train_baseline.py autoregressive`."""

    model: AutoregressiveModelSettings = field(default_factory=AutoregressiveModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(output_dir="runs/autoregressive"))
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_decay(self.optimizer, self.loop)
        if self.data.source_column is not None:
            raise ValueError(
                f"data.source_column={self.data.source_column!r}: pairs are for latent diffusion models; leave it out."
            )


def build_language_model(settings: AutoregressiveModelSettings, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A new model; ValueError where the backbone's embeddings do not fit it."""
    start_id = start_token_id(tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.sequence_length,
        bos_token_id=start_id,
        eos_token_id=tokenizer.eos_token_id,
        n_embd=settings.hidden_size,
        n_layer=settings.num_layers,
        n_head=settings.num_attention_heads,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout),
    )
    language_model = GPT2LMHeadModel(config)
    if settings.embeddings_from_backbone:
        start_from_backbone(language_model.transformer.wte.weight, settings.backbone)
    return language_model


class AutoregressiveRecipe(PipelineRecipe):
    """Training of an autoregressive language model."""

    settings_class = AutoregressiveSettings
    settings: AutoregressiveSettings
    module: AutoregressiveObjective

    def load(self) -> None:
        source = resolve_pretrained_source(self.settings.model.backbone)
        self.tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)
        self.sequence_length = self.settings.model.sequence_length
        language_model = build_language_model(self.settings.model, self.tokenizer)
        self.module = AutoregressiveObjective(language_model, start_token_id(self.tokenizer))

    def pipeline(self, snapshot: AutoregressiveObjective) -> AutoregressivePipeline:
        return AutoregressivePipeline(snapshot.language_model, self.tokenizer).to(self.device)

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        loss, accuracy = module(input_ids)
        return StepLosses(total=loss, values={"token_loss": loss, "token_accuracy": accuracy})

    @torch.no_grad()
    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        totals = torch.zeros(2, dtype=torch.float64)
        for input_ids in self.held_out.split(self.settings.evaluation.batch_size):
            losses = snapshot(input_ids.to(self.device))
            totals += torch.stack([value.double().cpu() for value in losses]) * len(input_ids)
        loss, accuracy = (totals / len(self.held_out)).tolist()
        return Evaluation({"token_loss": loss, "token_accuracy": accuracy})
