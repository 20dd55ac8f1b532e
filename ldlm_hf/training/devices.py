"""The run's devices and precision, and what a launcher may not set behind the run's settings."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from ..evaluation.machine import keep_freed_memory
from .settings import LoopSettings


def build_accelerator(settings: LoopSettings) -> Accelerator:
    """Devices and precision; ValueError where the launcher or the environment set what the run's settings do."""
    check_precision(settings)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=settings.trackers or None,
        project_dir=settings.output_dir,
        # evaluation keeps one process busy while the others wait for it
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    check_launcher(accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def check_precision(settings: LoopSettings) -> None:
    """Raises ValueError where the launcher names another precision; `no`, which it says for nothing too, is none."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", settings.mixed_precision):
        raise ValueError(
            f"The launcher asks for mixed_precision={launched} (its file, --mixed_precision, or "
            f"ACCELERATE_MIXED_PRECISION), and the run for loop.mixed_precision={settings.mixed_precision}: set the "
            "precision in loop.mixed_precision ('no' or 'bf16') alone."
        )


def check_launcher(accelerator: Accelerator) -> None:
    """Raises ValueError for what the launcher would do to models, losses or optimiser behind the run's settings."""
    steps, backend = accelerator.gradient_accumulation_steps, accelerator.state.dynamo_plugin.backend
    if steps != 1:
        raise ValueError(
            f"The launcher accumulates {steps} passes (ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}), "
            "which would divide the loss once more: unset it. How many passes a step takes follows from "
            "loop.batch_size and loop.device_batch_size."
        )
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"The launcher compiles the whole model (--dynamo_backend, ACCELERATE_DYNAMO_BACKEND={backend.value}), "
            "which changes the names of its weights: leave that out. loop.compile=true compiles the repeated blocks."
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(
            f"The launcher trains with {kind.value} (ACCELERATE_USE_{kind.value}), whose optimisers and checkpoints "
            "this loop does not know: use DDP or FSDP, see training/accelerate/."
        )
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "The launcher splits models over devices (parallelism_config, ACCELERATE_USE_PARALLELISM_CONFIG): leave "
            "that out, and use DDP or FSDP, see training/accelerate/."
        )
    if kind == DistributedType.FSDP:
        check_sharding(accelerator.state.fsdp_plugin)


def check_sharding(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises ValueError for kinds of FSDP whose weights have other names or shapes than the loop reads."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"The launcher sets fsdp_version={plugin.fsdp_version}: set 2, as training/accelerate/fsdp.yaml."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "The launcher sets fsdp_activation_checkpointing=true, which changes the names of the weights: leave it "
            "out; loop.gradient_checkpointing=true does the same."
        )
