"""The frozen token encoder: token ids → standardised hidden states of a pretrained language model."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple

from ..loading.checks import check_settings
from ..loading.pretrained_sources import is_public, resolve_pretrained_source
from ..loading.safe_loading import (
    CONFIG_FILE,
    SafeLoadingMixin,
    find_weights,
    read_json,
    read_shapes,
    resolve_folder,
)
from .conditions import Conditions, check_attention_mask
from .language_model import (
    add_position,
    cut_config,
    drop_parts_behind_blocks,
    language_model_config,
    language_model_mask,
    leave_out_masks,
    longest_sequence,
    prefix_token_id,
)
from .statistics import mean_and_std


REPRESENTATIONS = ("hidden", "embedding", "scratch")


class LDLMTokenEncoderConfig(PretrainedConfig):
    """Configuration of [`LDLMTokenEncoder`].

    Args:
        backbone_config: configuration of the language model, with its `model_type`, cut to the layers that are run
            (`representation="hidden"` only).
        layer: index into transformers' `hidden_states` of the language model as it was pretrained: 0 is what enters
            the first block, -1 what leaves the model (after its final norm, where it has one).
        apply_final_norm: whether that index lies behind the final norm, which only the last one does.
        representation: `"hidden"`: hidden states of that layer; `"embedding"`: frozen token embeddings alone, without
            positions; `"scratch"`: trainable token embeddings.
        normalize_embeddings: whether embeddings from scratch are scaled to the norm sqrt(D), as in CDCD (Dieleman et
            al., 2022): a diffusion loss that is trained through embeddings of free scale shrinks them to nothing.
        vocab_size: vocabulary V.
        hidden_size: width D.
        max_position_embeddings: longest sequence that the language model takes; None where nothing bounds it.
        prefix_token_id: token that the language model reads before the text and whose hidden state is dropped
            (`representation="hidden"` only); None puts nothing there. A language model's hidden state of its first
            token is an attention sink that hardly depends on the token, so without a prefix the first word is lost.
        num_statistics_tokens: tokens that mean and standard deviation were computed over; 0 means not yet fitted.
        backbone_source: where the language model comes from, if others can get it there: a Hub id, or
            `package:NAME/FOLDER`.
        backbone_revision: commit of that Hub id.
        backbone_stored: whether the language model is saved with the token encoder, or loaded from its source.

    Raises:
        ValueError: an unknown representation, a `"hidden"` one without `backbone_config`, or a prefix that is not a
            token of a language model.
    """

    model_type = "ldlm_token_encoder"

    def __init__(
        self,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        layer: int = -3,
        apply_final_norm: bool = False,
        representation: str = "embedding",
        normalize_embeddings: bool = False,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        max_position_embeddings: int | None = None,
        prefix_token_id: int | None = None,
        num_statistics_tokens: int = 0,
        backbone_source: str | None = None,
        backbone_revision: str | None = None,
        backbone_stored: bool = True,
        **kwargs: Any,
    ):
        check_settings(LDLMTokenEncoderConfig.__init__, locals(), prefix_token_id=f"[0, {vocab_size})")
        check_representation(representation, normalize_embeddings)
        if prefix_token_id is not None and representation != "hidden":
            raise ValueError(
                f"prefix_token_id={prefix_token_id} with representation={representation!r}: only a language model "
                "reads what stands before the text; leave it out."
            )
        if not backbone_stored and (representation == "scratch" or not is_public(backbone_source)):
            raise ValueError(
                f"backbone_stored=False with representation={representation!r}, backbone_source={backbone_source!r}: "
                "the frozen language model has to come from a Hub id or package:NAME/FOLDER."
            )
        if isinstance(backbone_config, PretrainedConfig):
            backbone_config = backbone_config.to_dict()
        if representation == "hidden" and backbone_config is None:
            raise ValueError(
                "representation='hidden' needs the backbone_config of a language model; "
                "LDLMTokenEncoder.from_backbone(name_or_path) fills it in."
            )
        if backbone_config is not None:
            # the type that the weights are loaded in is the token encoder's, not that of some earlier model
            backbone_config = {key: value for key, value in backbone_config.items() if key != "dtype"}
        self.backbone_config = backbone_config
        self.layer = layer
        self.apply_final_norm = apply_final_norm
        self.representation = representation
        self.normalize_embeddings = normalize_embeddings
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.prefix_token_id = prefix_token_id
        self.num_statistics_tokens = num_statistics_tokens
        self.backbone_source = backbone_source
        self.backbone_revision = backbone_revision
        self.backbone_stored = backbone_stored
        super().__init__(**kwargs)


def check_representation(representation: str, normalize_embeddings: bool) -> None:
    """Raises ValueError for an unknown representation, or one whose embeddings are not normalised."""
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation={representation!r} is unknown; it is one of {', '.join(REPRESENTATIONS)}.")
    if normalize_embeddings and representation != "scratch":
        raise ValueError(
            f"normalize_embeddings=True with representation={representation!r}: only embeddings that are trained "
            "from scratch are normalised, the others are standardised; leave it out."
        )


@dataclass
class LDLMTokenEncoderOutput(ModelOutput):
    """
    Attributes:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Hidden states with zero mean and unit variance in each dimension over the fitted sample.
        backbone_hidden_states (`tuple[torch.FloatTensor]`, with `output_hidden_states=True`):
            Those of the language model, not standardised, each of the same shape: what enters the first block that is
            kept, and what leaves each.
        attentions (`tuple[torch.FloatTensor]`, with `output_attentions=True`):
            Attention weights of each block, of shape `(batch_size, num_heads, sequence_length, sequence_length)`; with
            a prefix one row and one column more, the first ones.
    """

    hidden_states: torch.Tensor | None = None
    backbone_hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class LDLMTokenEncoder(SafeLoadingMixin, PreTrainedModel):
    r"""
    The frozen token encoder of LDLM: runs a pretrained language model up to one layer and standardises what it finds
    there. Both the latent encoder's input and the target of the hidden-state loss (Section 6, Eq. 2).

    It has no gradient and always runs in evaluation mode, except with `representation="scratch"`, whose embeddings
    are trained.

    Example:

    ```python
    >>> from ldlm_hf import LDLMTokenEncoder

    >>> token_encoder = LDLMTokenEncoder.from_backbone("openai-community/gpt2", layer=-3)
    >>> token_encoder.fit_statistics(batches)  # batches of input_ids (B, L)
    >>> hidden_states = token_encoder(input_ids).hidden_states  # (B, L, D)
    ```
    """

    config_class = LDLMTokenEncoderConfig
    base_model_prefix = "ldlm_token_encoder"
    main_input_name = "input_ids"
    # the language model itself refuses what it does not support
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    # hidden states of language models have dimensions far from zero, whose mean half precision would round away
    _keep_in_fp32_modules_strict = ["mean", "std"]

    def __init__(self, config: LDLMTokenEncoderConfig):
        super().__init__(config)
        if config.representation == "hidden" and config.backbone_config is not None:
            # torch's fused attention is the default, which a language model may do without
            attention = None if config._attn_implementation == "sdpa" else config._attn_implementation
            self.backbone = AutoModel.from_config(
                language_model_config(config.backbone_config), attn_implementation=attention, trust_remote_code=False
            )
            drop_parts_behind_blocks(self.backbone, config.apply_final_norm)
            leave_out_masks(self.backbone)
        else:
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.register_buffer("mean", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("std", torch.ones(config.hidden_size, dtype=torch.float32))
        self.freeze()
        self.eval()
        self.post_init()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in [`~transformers.PreTrainedModel.set_attn_implementation`], for the language model."""
        super().set_attn_implementation(*args, **kwargs)
        if self.config.representation == "hidden":
            leave_out_masks(self.backbone)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings() if self.config.representation == "hidden" else self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if self.config.representation == "hidden":
            self.backbone.set_input_embeddings(value)
        else:
            self.embedding = value
        self.freeze()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in [`~transformers.PreTrainedModel.resize_token_embeddings`]. A frozen language model does not learn what
        its new tokens mean, and the statistics stay those of the tokens that they were fitted on."""
        if self.config.representation != "hidden":
            return super().resize_token_embeddings(*args, **kwargs)
        embedding = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = embedding.num_embeddings
        self.config.backbone_config = self.config.backbone_config | {"vocab_size": embedding.num_embeddings}
        return embedding

    def freeze(self) -> None:
        """Only embeddings from scratch are trained."""
        self.requires_grad_(self.config.representation == "scratch")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in [`~transformers.PreTrainedModel.from_pretrained`]; a language model that is not stored with the token
        encoder is loaded from its own source.

        Raises:
            OSError: that is not to be had.
        """
        if pretrained_model_name_or_path is not None and kwargs.get("use_safetensors") is not False:
            variant = kwargs.get("variant")
            folder = resolve_folder(pretrained_model_name_or_path, cls.weights_name(), variant, kwargs)
            pretrained_model_name_or_path = str(folder)
            if read_json(folder / CONFIG_FILE).get("backbone_stored") is False:
                return cls._from_statistics(folder, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        token_encoder = loaded[0] if isinstance(loaded, tuple) else loaded
        # every weight that is loaded is trainable
        token_encoder.freeze()
        return loaded

    @classmethod
    def _from_statistics(cls, folder: Path, variant: str | None = None, **kwargs: Any) -> LDLMTokenEncoder:
        """A token encoder of whose weights the folder holds mean and standard deviation alone; `kwargs` go to
        `AutoModel.from_pretrained` of the language model."""
        # an Auto class has read it already
        config = kwargs.pop("config", None) or cls.config_class.from_dict(read_json(folder / CONFIG_FILE))
        found, expected = read_shapes(folder, cls.weights_name(), variant), (config.hidden_size,)
        if found != {"mean": expected, "std": expected}:
            raise ValueError(
                f"{folder}: backbone_stored=False, so the weights are `mean` and `std` of shape {expected}, but they "
                f"are {reprlib.repr(found)}. Get {CONFIG_FILE} and weights from the same source."
            )
        (file,) = find_weights(folder, cls.weights_name(), variant)
        try:
            token_encoder = cls._from_source(config, **kwargs)
        except OSError as error:
            raise OSError(
                f"{folder} names its language model, {config.backbone_source!r}, which cannot be loaded: {error} "
                "Sampling without prompts does without: load the pipeline with token_encoder=None."
            ) from error
        for name, values in load_file(file).items():
            setattr(token_encoder, name, values.float().to(token_encoder.device))
        token_encoder.config = config
        return token_encoder

    @classmethod
    def _from_source(cls, config: LDLMTokenEncoderConfig, **kwargs: Any) -> LDLMTokenEncoder:
        """The token encoder of a configuration, not fitted, with the language model of its source."""
        source = resolve_pretrained_source(str(config.backbone_source))
        if config.backbone_revision is not None:
            kwargs["revision"] = config.backbone_revision
        # never pickled weights, which a repository could name
        safe: dict[str, Any] = source.kwargs or {"use_safetensors": True}
        backbone = AutoModel.from_pretrained(source.name_or_path, **{"dtype": torch.float32} | kwargs | safe).eval()
        if config.representation == "embedding":
            token_encoder = cls._from_embedding(backbone.get_input_embeddings().weight)
        else:
            token_encoder = cls._from_layers(backbone, config.layer, config.prefix_token_id)
        for name in ("hidden_size", "vocab_size"):
            if getattr(token_encoder.config, name) != getattr(config, name):
                raise ValueError(
                    f"The language model {config.backbone_source!r} has {name}={getattr(token_encoder.config, name)}, "
                    f"and this token encoder was made from one with {getattr(config, name)}."
                )
        return token_encoder.to(backbone.device)

    def leave_out_backbone(self, source: str | None = None) -> None:
        """Has the token encoder saved without its language model, which is loaded from its source then: a frozen one
        is nowhere different from what everybody can have.

        Args:
            source: Hub id or `package:NAME/FOLDER`; by default the one that it was made from.

        Raises:
            ValueError: embeddings from scratch, a source that others do not have, or one with other weights.
            OSError: the source is not to be had.
        """
        changes: dict[str, Any] = {"backbone_stored": False}
        if source is not None:
            changes |= {"backbone_source": source, "backbone_revision": None}
        config = self.config_class.from_dict(self.config.to_dict() | changes)
        state = self._from_source(config, dtype=torch.float32).state_dict()
        for name, values in self.state_dict().items():
            if name not in ("mean", "std") and not torch.equal(state[name].to(values), values):
                raise ValueError(
                    f"The language model {config.backbone_source!r} has another {name} than this token encoder: name "
                    "the one that it was made from."
                )
        self.config.update(changes)

    def saved_weights(self) -> dict[str, torch.Tensor] | None:
        return None if self.config.backbone_stored else {"mean": self.mean, "std": self.std}

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.zeros_(self.mean)
            nn.init.ones_(self.std)
        elif isinstance(module, nn.Embedding):
            # unit scale, so that embeddings trained from scratch start out standardised (ours)
            nn.init.normal_(module.weight)
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        layer: int = -3,
        representation: str = "hidden",
        normalize_embeddings: bool = False,
        prefix: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> LDLMTokenEncoder:
        """Starts a token encoder from a causal or masked language model of transformers, with its first layers only.

        Args:
            name_or_path: Hub id, folder, `package:NAME/FOLDER` or `package:NAME/FILE.gguf` of the language model.
            layer: index into transformers' `hidden_states`; -3 (the paper's "third-to-last") is what leaves the block
                two before the last. The blocks behind it are dropped.
            representation: `"hidden"`, `"embedding"` (token embeddings alone, no positions) or `"scratch"`
                (trainable embeddings of the same vocabulary and width).
            normalize_embeddings: see [`LDLMTokenEncoderConfig`]; with `"scratch"` only.
            prefix: whether the language model reads a token before the text: the tokenizer's BOS, CLS or, where it has
                neither, end-of-text token (see [`LDLMTokenEncoderConfig`]); with `"hidden"` only.
            tokenizer: the one that makes the token ids; by default that of the language model.
            kwargs: passed to `AutoModel.from_pretrained` (`revision`, `cache_dir`, `token`, ...).

        Raises:
            ValueError: the model has no such layer, `representation` is unknown, or the tokenizer has no token that
                could be the prefix.
            OSError: the model is not found.
        """
        check_representation(representation, normalize_embeddings)
        source = resolve_pretrained_source(name_or_path)
        if representation == "scratch":
            sizes = AutoConfig.from_pretrained(source.name_or_path, **source.kwargs, **kwargs)
            return cls(
                cls.config_class(
                    representation=representation,
                    normalize_embeddings=normalize_embeddings,
                    vocab_size=sizes.vocab_size,
                    hidden_size=sizes.hidden_size,
                )
            )
        kwargs.setdefault("dtype", torch.float32)
        backbone = AutoModel.from_pretrained(source.name_or_path, **source.kwargs, **kwargs).eval()
        if representation == "embedding":
            token_encoder = cls._from_embedding(backbone.get_input_embeddings().weight)
            token_encoder.note_source(name_or_path, backbone)
            return token_encoder
        num_blocks = backbone.config.num_hidden_layers
        if not -num_blocks - 1 <= layer <= num_blocks:
            raise ValueError(
                f"layer={layer} does not exist in {name_or_path!r}, whose {num_blocks} blocks give hidden states "
                f"{-num_blocks - 1} to {num_blocks} (0 is what enters the first block)."
            )
        if prefix and tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs, **kwargs)
        token_encoder = cls._from_layers(backbone, layer, prefix_token_id(tokenizer) if prefix else None)
        token_encoder.note_source(name_or_path, backbone)
        return token_encoder

    def note_source(self, name_or_path: str, backbone: PreTrainedModel) -> None:
        """Keeps in the configuration where the language model came from, if others can get it there."""
        if is_public(name_or_path):
            self.config.backbone_source = name_or_path
            self.config.backbone_revision = getattr(backbone.config, "_commit_hash", None)

    @classmethod
    def _from_embedding(cls, weight: torch.Tensor) -> LDLMTokenEncoder:
        """The token embeddings (V, D) of a language model alone."""
        vocab_size, hidden_size = weight.shape
        token_encoder = cls(
            cls.config_class(representation="embedding", vocab_size=vocab_size, hidden_size=hidden_size)
        )
        token_encoder.embedding.load_state_dict({"weight": weight})
        return token_encoder.to(weight.dtype)

    @classmethod
    def _from_layers(cls, backbone: PreTrainedModel, layer: int, prefix_token_id: int | None) -> LDLMTokenEncoder:
        """A language model up to one of its hidden states."""
        num_blocks = layer % (backbone.config.num_hidden_layers + 1)
        longest = longest_sequence(backbone)
        if prefix_token_id is not None:
            add_position(backbone)
        config = cls.config_class(
            backbone_config=cut_config(backbone.config, num_blocks),
            layer=layer,
            apply_final_norm=num_blocks == backbone.config.num_hidden_layers,
            representation="hidden",
            vocab_size=backbone.get_input_embeddings().num_embeddings,
            hidden_size=backbone.config.hidden_size,
            max_position_embeddings=longest,
            prefix_token_id=prefix_token_id,
            attn_implementation=backbone.config._attn_implementation,
        )
        token_encoder = cls(config).to(backbone.dtype)
        state = backbone.state_dict()
        token_encoder.backbone.load_state_dict({name: state[name] for name in token_encoder.backbone.state_dict()})
        token_encoder.check_against(backbone)
        return token_encoder

    @torch.no_grad()
    def check_against(self, backbone: PreTrainedModel) -> None:
        """Raises ValueError unless the layers that were kept give what the whole language model gives there."""
        length = min(8, self.config.max_position_embeddings or 8)
        probe = torch.arange(length, device=backbone.device)[None] % self.config.vocab_size
        output = backbone(input_ids=probe, output_hidden_states=True, return_dict=True)
        expected = output.hidden_states[self.config.layer]
        hidden_states = self.backbone(input_ids=probe, return_dict=True).last_hidden_state
        tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
        if not torch.allclose(hidden_states, expected, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"The layers of {type(backbone).__name__} are not laid out in the way that LDLMTokenEncoder knows: "
                f"the first {self.backbone.config.num_hidden_layers} of them do not give its hidden state "
                f"{self.config.layer}. Use another backbone, or representation='embedding'."
            )

    @torch.no_grad()
    def check_masks(self) -> None:
        """Raises ValueError unless the language model heeds masks: given tokens must not see the others."""
        if self.config.representation != "hidden":
            return
        given = torch.tensor([[True, False, True, False]], device=self.device)
        mask = Conditions(given).attention_mask()
        # tokens from the middle of the vocabulary, where no padding is
        text = torch.arange(4, device=self.device)[None] + self.config.vocab_size // 2
        other = torch.where(given, text, text + 4)  # of the same given tokens
        language_model_mask(self.backbone, mask, has_prefix=False, dtype=self.backbone.dtype)  # says what it refuses
        try:
            first, second = (self._run_language_model(ids, mask).last_hidden_state[given] for ids in (text, other))
            everything = self._run_language_model(text, torch.ones_like(mask)).last_hidden_state
            heeds = torch.equal(first, second)
        except (RuntimeError, TypeError, ValueError):  # of a language model that makes something else of a mask
            heeds = False
        if not heeds or not torch.allclose(everything, self.run_backbone(text), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"The attention of {type(self.backbone).__name__} does not heed masks of its own for each token, so "
                "no part of a text can be given; use another backbone, or set conditioning's shares to 0."
            )

    def train(self, mode: bool = True) -> LDLMTokenEncoder:
        """Sets the training mode; a frozen language model stays in evaluation mode, without dropout."""
        return super().train(mode and self.config.representation == "scratch")

    @property
    def is_fitted(self) -> bool:
        """Whether hidden states can be standardised; embeddings from scratch need no statistics, as they move."""
        return self.config.representation == "scratch" or self.config.num_statistics_tokens > 0

    def run_backbone(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) → hidden states (B, L, D), not standardised."""
        return self._run_language_model(input_ids).last_hidden_state

    def _run_language_model(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **outputs: bool
    ) -> ModelOutput:
        """What the language model gives for token ids (B, L), with the further `outputs` that it is asked for."""
        has_prefix = self.config.prefix_token_id is not None
        arguments: dict[str, Any] = {"return_dict": True, **outputs}
        if attention_mask is not None and self.config.representation == "hidden":
            mask = language_model_mask(self.backbone, attention_mask, has_prefix, self.backbone.dtype)
            arguments["attention_mask"] = mask
        if has_prefix:
            return self._run_with_prefix(input_ids, arguments)
        if self.config.representation == "hidden":
            return self.backbone(input_ids=input_ids, **arguments)
        embeddings = self.embedding(input_ids)
        if self.config.normalize_embeddings:
            embeddings = F.normalize(embeddings, dim=-1) * math.sqrt(self.config.hidden_size)
        return BaseModelOutput(last_hidden_state=embeddings, hidden_states=(embeddings,))

    def _run_with_prefix(self, input_ids: torch.Tensor, arguments: dict[str, Any]) -> ModelOutput:
        """The same for the text behind the prefix, without the prefix's hidden states."""
        input_ids = F.pad(input_ids, (1, 0), value=self.config.prefix_token_id)  # (B, 1 + L)
        output = self.backbone(input_ids=input_ids, **arguments)
        if output.hidden_states is not None:
            output.hidden_states = tuple(hidden_states[:, 1:] for hidden_states in output.hidden_states)
        output.last_hidden_state = output.last_hidden_state[:, 1:]  # (B, L, D)
        return output

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> None:
        """Computes the mean and standard deviation of each dimension over all tokens of a sample of the data set.

        Sums are taken in float64; the variance is floored at 1e-4.

        Args:
            batches: batches of token ids (B, L), or mappings that hold them as `input_ids`.

        Raises:
            ValueError: no batches, or embeddings that are trained from scratch, which have nothing fixed to fit.
        """
        if self.config.representation == "scratch":
            raise ValueError("representation='scratch' is trained, so it has no fixed statistics; do not fit it.")
        mean, std, count = mean_and_std(self._unstandardised(batches))
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.config.num_statistics_tokens = count

    def _unstandardised(self, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Hidden states (B, L, D) of batches, as the language model gives them."""
        for batch in batches:
            input_ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
            self.check_input_ids(input_ids)
            if input_ids.numel():
                yield self.run_backbone(input_ids.to(self.mean.device))

    def check_input_ids(self, input_ids: torch.Tensor) -> None:
        """Raises ValueError for token ids of a wrong type, a wrong shape or outside the vocabulary."""
        if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.ndim != 2:
            raise ValueError(
                "input_ids must be integers (torch.long) of shape (batch_size, sequence_length); "
                f"got {input_ids.dtype} of shape {tuple(input_ids.shape)}."
            )
        longest = self.config.max_position_embeddings
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids of {input_ids.shape[1]} tokens are longer than the {longest} that the language model "
                "takes (max_position_embeddings); use shorter sequences or another backbone."
            )
        # on an accelerator the look at the values would stall the queue, and its embedding kernel checks them itself
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            lowest, highest = torch.aminmax(input_ids)
            if lowest < 0 or highest >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids reach from {int(lowest)} to {int(highest)}, outside the vocabulary of "
                    f"{self.config.vocab_size} tokens; was another tokenizer used?"
                )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LDLMTokenEncoderOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids, without padding.
            attention_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length, sequence_length)`, *optional*):
                Whether token i may attend to token j, beside what a causal language model forbids anyway; `None`
                stands for all.
            output_attentions: whether to return the language model's attention weights; as the configuration has it
                by default.
            output_hidden_states: whether to return the language model's hidden states, likewise.
            return_dict: whether to return an [`LDLMTokenEncoderOutput`] instead of a tuple, likewise.

        Raises:
            ValueError: token ids that are no integers, out of range or too long, an encoder that is not fitted,
                attention weights from an attention that has none, a mask of another type or shape, or one for a
                language model that takes none.
        """
        self.check_input_ids(input_ids)
        if not self.is_fitted:
            raise ValueError(
                "This token encoder has no statistics yet (num_statistics_tokens=0), so its hidden states cannot be "
                "standardised. Call fit_statistics(batches) on a sample of the data set first."
            )
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # not all language models know the names of what they are not asked for
        outputs = {}
        if output_attentions:
            self._check_attention_weights()
            outputs["output_attentions"] = True
        if output_hidden_states:
            outputs["output_hidden_states"] = True
        if attention_mask is not None:
            check_attention_mask(attention_mask, *input_ids.shape)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.representation == "scratch"):
            output = self._run_language_model(input_ids, attention_mask, **outputs)
            hidden_states = output.last_hidden_state
            standardised = (hidden_states.float() - self.mean.float()) / self.std.float()
            hidden_states = standardised.to(hidden_states.dtype)  # (B, L, D)
        return LDLMTokenEncoderOutput(
            hidden_states=hidden_states,
            backbone_hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=output.attentions if output_attentions else None,
        )

    def _check_attention_weights(self) -> None:
        """Raises ValueError unless the language model's attention gives its weights away."""
        if self.config.representation != "hidden":
            raise ValueError(
                f"output_attentions=True: representation={self.config.representation!r} has no attention; leave "
                "it out."
            )
        implementation = self.backbone.config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"output_attentions=True: the attention {implementation!r} gives no weights away; call "
                "set_attn_implementation('eager') first."
            )
