"""Fine-tuning of a pipeline's denoiser by LoRA, on a frozen autoencoder (Hu et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.utils.data import Dataset

from ...data import DataSettings, load_corpora
from ...evaluation.real_text import held_out_part, held_out_rows
from ...evaluation.samplers import OWN
from ...loading.checks import check_settings
from ...models.transformer_ldlm import LDLMTransformer1DModel
from ...objective import JointObjective
from ...pipelines.pipeline_ldlm import LDLMPipeline
from ...schedulers.scheduling_tangent_euler_maruyama import TangentEulerMaruyamaScheduler
from ..components import build_pipeline, build_tokenizer, load_autoencoder, load_part, load_pipeline_settings
from ..held_out import diffusion_loss_at
from ..recipe import Evaluation
from ..settings import LoopSettings, OptimizerSettings, RunSettings
from .joint import JointRecipe


@dataclass
class LoraSettings:
    """The adapter: W + alpha / rank B A for the weight of each of the denoiser's layers that are named.

    Attributes:
        rank: of B A.
        alpha: its scale, times the rank.
        target_modules: ends of the names of linear layers. Attention has `to_qkv`, one projection for queries, keys
            and values, and `to_out`; others are `feed_forward.linear_in`, `feed_forward.linear_out`,
            `modulation.linear`, `proj_in` and `proj_out`.
    """

    rank: int = 8
    alpha: float = 8.0
    target_modules: list[str] = field(default_factory=lambda: ["to_qkv", "to_out"])

    def __post_init__(self) -> None:
        check_settings(type(self).__init__, vars(self), rank="[1, inf)", alpha="(0, inf)")
        if not self.target_modules:
            raise ValueError("target_modules=[] names no layer.")


@dataclass
class LoraRunSettings(RunSettings):
    """All settings of `train_lora.py`: those of joint training in the stage `diffusion`, and these.

    Attributes:
        components: folder or Hub id of the pipeline, whose parts are all frozen. Of `model` only `sequence_length`,
            `statistics_sequences` and, for a pipeline without its token encoder, `backbone` and what belongs to it are
            read.
        lora: the adapter.
        base_data: text that the pipeline was trained on, split as it was then. Evaluations measure on it what the
            adapter costs there, and a token encoder that the pipeline lacks gets its statistics, which are then those
            that the pipeline was trained with. Without a `source` neither is done, and statistics are those of `data`.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    base_data: DataSettings = field(default_factory=DataSettings)
    stage: str = "diffusion"
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(learning_rate=1e-3, lr_warmup_steps=50, ema_decay=0.99)
    )
    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(output_dir="runs/lora", max_steps=1_000, batch_size=32)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            "model.transformer": self.model.transformer,
            "model.scheduler": self.model.scheduler,
            "consistency.weight": self.consistency.weight,
        }
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{name}={value}: an adapter is trained by the diffusion loss alone, of the pipeline "
                    "as it is; leave it out."
                )
        if self.evaluation.sampler != OWN:
            raise ValueError(
                f"evaluation.sampler={self.evaluation.sampler!r}: an adapter has no sampler, and samples are drawn by "
                "that of the pipeline; leave it out."
            )

    def check_stage(self) -> None:
        if self.stage != "diffusion":
            raise ValueError(f"stage={self.stage!r}: an adapter is trained in the stage 'diffusion'; leave it out.")


class LoraRecipe(JointRecipe):
    """Training of an adapter; all else of the pipeline stays as it is."""

    settings_class = LoraRunSettings
    settings: LoraRunSettings
    result_folder = "lora"

    def __init__(self, settings: LoraRunSettings, accelerator: Accelerator):
        super().__init__(settings, accelerator)
        self.base_train: Dataset[dict[str, torch.Tensor]] | None = None
        self.base_held_out: dict[str, torch.Tensor] = {}
        self.losses_without: dict[str, float] = {}

    def load(self) -> None:
        if not self.settings.components:
            raise ValueError("components='' names no pipeline to fine-tune; set components=RUN/pipeline or a Hub id.")
        self.tokenizer = build_tokenizer(self.settings)
        self.sequence_length = self.settings.model.sequence_length
        self.scheduler = load_part(self.settings.components, "scheduler")
        self.pipeline_settings = load_pipeline_settings(self.settings.components)
        check_kind_of_text(self.settings, self.pipeline_settings)
        self.module = build_lora_objective(self.settings, self.scheduler.config.tangent_d)

    def build(self, train: Dataset[dict[str, torch.Tensor]], held_out: Dataset[dict[str, torch.Tensor]]) -> None:
        if self.settings.base_data.source:
            with self.accelerator.main_process_first():
                corpora = load_corpora(
                    self.settings.base_data,
                    self.tokenizer,
                    self.sequence_length,
                    rank=self.accelerator.process_index,
                    world_size=self.accelerator.num_processes,
                )
            self.base_train = corpora.train
            self.base_held_out = held_out_rows(held_out_part(corpora), self.settings.evaluation.num_sequences)
        super().build(train, held_out)

    def standardizes_latents(self) -> bool:
        return False  # the denoiser knows them as they are

    def statistics_batches(self, train: Dataset[dict[str, torch.Tensor]]) -> Any:
        return super().statistics_batches(train if self.base_train is None else self.base_train)

    def expected_scheduler(self) -> SchedulerMixin:
        return self.scheduler

    def with_timestep_cdf(self, scheduler: Any) -> Any:
        return scheduler  # which times are hard was learned with the pipeline

    def build_pipeline(self, snapshot: JointObjective) -> LDLMPipeline:
        return build_pipeline(
            snapshot, tokenizer=self.tokenizer, scheduler=self.scheduler, **self.pipeline_settings
        ).to(self.device)

    def save(self, snapshot: nn.Module, folder: Path) -> None:
        """Writes the adapter's file alone."""
        assert isinstance(snapshot, JointObjective) and snapshot.transformer is not None
        LDLMPipeline.save_lora_weights(
            folder,
            get_peft_model_state_dict(snapshot.transformer),
            transformer_lora_adapter_metadata=snapshot.transformer.peft_config["default"].to_dict(),
        )

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        """As of joint training; and the diffusion loss without the adapter, and both on the pipeline's own text."""
        assert isinstance(snapshot, JointObjective) and snapshot.transformer is not None
        evaluation = super().evaluate(snapshot, step)
        if self.base_held_out:
            evaluation.values["base_diffusion_loss"] = self.diffusion_loss(snapshot, **self.base_held_out)
        if not self.losses_without:
            snapshot.transformer.disable_adapters()
            self.losses_without["diffusion_loss_without_adapter"] = self.diffusion_loss(
                snapshot, self.held_out, self.held_out_given
            )
            if self.base_held_out:
                self.losses_without["base_diffusion_loss_without_adapter"] = self.diffusion_loss(
                    snapshot, **self.base_held_out
                )
            snapshot.transformer.enable_adapters()
        evaluation.values |= self.losses_without
        return evaluation

    def diffusion_loss(
        self, snapshot: JointObjective, input_ids: torch.Tensor, given: torch.Tensor | None = None
    ) -> float:
        """Held-out diffusion loss of token ids (n, L), on the grid of evaluations and with their noise."""
        evaluation = self.settings.evaluation
        grid = torch.linspace(0, 1, evaluation.grid_size + 1, dtype=torch.float64)[1:]
        losses = diffusion_loss_at(snapshot, input_ids, grid, evaluation.batch_size, self.device, given)
        return sum(losses) / len(losses)


def check_kind_of_text(settings: LoraRunSettings, of_pipeline: dict[str, Any]) -> None:
    """Raises ValueError for text of another kind than the pipeline was trained on, which an adapter cannot note."""
    data = settings.data
    found = {"ends_texts": data.is_separate, "source_length": data.source_length}
    known = {"ends_texts": bool(of_pipeline.get("ends_texts")), "source_length": of_pipeline.get("source_length")}
    if found != known:
        raise ValueError(
            f"data.documents={data.documents!r} and data.source_length={data.source_length} are text of another kind "
            f"than components={settings.components!r} were trained on ({known}): use one document a row, or pairs, "
            "where it was trained on these, and packed documents elsewhere."
        )


def build_lora_objective(settings: LoraRunSettings, tangent_d: float) -> JointObjective:
    """The objective of a new adapter of a pipeline's denoiser, on the latents of its autoencoder."""
    transformer = load_part(settings.components, "transformer")
    add_adapter(transformer, settings.lora)
    config = transformer.config
    if config.next_timestep_conditioning:
        raise ValueError(
            f"components={settings.components!r} hold a distilled student, a flow map, which the diffusion loss would "
            "spoil; fine-tune its teacher, and distil that."
        )
    if settings.gives_texts and not config.role_embeds:
        raise ValueError(
            f"components={settings.components!r} were trained on whole texts (role_embeds=False): set both shares of "
            "conditioning to 0, or train them on by train_joint.py (docs/conditioning.md)."
        )
    objective = settings.objective
    if not config.self_conditioning:
        objective = replace(objective, self_conditioning_probability=0.0)
    return JointObjective(
        **load_autoencoder(settings),
        transformer=transformer,
        scheduler=TangentEulerMaruyamaScheduler(tangent_d=tangent_d),
        settings=objective,
        stage="diffusion",
    )


def add_adapter(transformer: LDLMTransformer1DModel, settings: LoraSettings) -> None:
    """Adds a new adapter and freezes everything else; ValueError for names that no linear layer has."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in settings.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.split(".", 2)[-1] for name in layers})
            raise ValueError(
                f"lora.target_modules: no linear layer of the denoiser is named {target!r}, but {', '.join(ends)}. "
                "Queries, keys and values have one projection, to_qkv."
            )
    transformer.requires_grad_(False)
    # peft's alpha may be any number
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=list(settings.target_modules),
    )
    transformer.add_adapter(config)
