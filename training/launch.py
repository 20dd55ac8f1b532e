"""What the training scripts share on their way to the loop: command line, devices, text, and the printed overview."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast,
)
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from accelerate import Accelerator
from components import compile_blocks, count_parameters, trained_components
from evaluation import held_out_sequences
from flops import RunEstimate, device_peak, estimate_run
from host_memory import keep_freed_memory
from hub_upload import HubUploads, add_hub_arguments
from ldlm_hf import JointObjective, LDLMPipeline, LDLMTokenEncoder, load_corpora, resolve_pretrained_source
from ldlm_hf.data import DataSettings, TextCorpora
from ldlm_hf.models.statistics import mean_and_std
from loop import TrainingLoop, split_batch
from model_card import write_results
from run_folder import check_output_dir
from samplers import OWN, Sampler
from settings import EvaluationSettings, LoopSettings, RunSettings, human_count, to_yaml
from task import Evaluation, Task
from tracking import check_trackers


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line that all training scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--dry_run", action="store_true", help="print settings, parameter counts, tokens a step; stop")
    parser.add_argument("--resume_from_checkpoint", metavar="latest|PATH", help="go on from a checkpoint")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--license", metavar="ID", help="licence of the trained weights, for the model card")
    parser.add_argument("--language", metavar="CODE", help="language of the training text, for the model card")
    add_hub_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, over those of the file")
    arguments = parser.parse_intermixed_args()
    if arguments.hub_model_id and not (arguments.push_to_hub or arguments.push_checkpoints):
        parser.error("--hub_model_id goes with --push_to_hub or --push_checkpoints")
    return arguments


def build_accelerator(settings: LoopSettings) -> Accelerator:
    """Devices and precision; how many of them, `accelerate launch` says.

    Raises:
        ValueError: the launcher, or its variables in the environment, set what the run's settings do.
    """
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


def prepare_run(
    arguments: argparse.Namespace, settings: Any, accelerator: Accelerator, scheduler: Any | None
) -> tuple[Path | None, HubUploads | None]:
    """Finds out, before any work is done, what would stop the run later: folder, checkpoint, trackers, sampler, judge,
    Hub.

    Args:
        scheduler: of the trained pipeline, which `evaluation.sampler` is made from; None where there will be none.

    Returns:
        the checkpoint to go on from, and on the main process where to upload to; None where there is no such.
    """
    checkpoint = check_output_dir(settings, arguments.resume_from_checkpoint, arguments.overwrite_output_dir)
    check_trackers(settings.loop.trackers)
    if scheduler is not None:
        check_sampler(settings.evaluation, scheduler)
    check_judge(settings.evaluation)
    if not accelerator.is_main_process or not (arguments.push_to_hub or arguments.push_checkpoints):
        return checkpoint, None
    return checkpoint, HubUploads(
        arguments.hub_model_id or Path(settings.loop.output_dir).resolve().name, arguments.hub_private
    )


def build_loop(
    task: Task,
    dataset: Dataset[dict[str, torch.Tensor]],
    sequence_length: int,
    settings: Any,
    accelerator: Accelerator,
    arguments: argparse.Namespace,
    checkpoint: Path | None,
    uploads: HubUploads | None,
) -> TrainingLoop:
    """The loop of a run, after its cost has been printed."""
    return TrainingLoop(
        task,
        dataset,
        estimate(task.module, settings.loop, sequence_length, accelerator),
        accelerator,
        settings,
        checkpoint,
        overwrite=arguments.overwrite_output_dir,
        on_checkpoint=uploads.push_checkpoint if uploads is not None and arguments.push_checkpoints else None,
    )


def finish_run(
    pipeline: LDLMPipeline,
    validation: Dataset[dict[str, torch.Tensor]],
    settings: Any,
    evaluation: Evaluation,
    seconds: float,
    arguments: argparse.Namespace,
    uploads: HubUploads | None,
) -> None:
    """Gives a trained pipeline, which is saved already, its sampler, samples, results and card, and uploads it if that
    was asked for.

    Raises:
        ValueError: a learned time grid for `evaluation.sampler`, and a run that has not seen every time yet.
    """
    folder = pipeline_folder(settings)
    sampler = Sampler.parse(settings.evaluation.sampler)
    if sampler.scheduler != OWN:
        sampler.apply(pipeline)
        pipeline.save_pretrained(folder)
    write_results(
        pipeline,
        validation,
        settings,
        evaluation.values,
        seconds,
        license=arguments.license,
        language=arguments.language,
        model_id=uploads.model_id if uploads is not None and arguments.push_to_hub else None,
    )
    if uploads is not None and arguments.push_to_hub:
        uploads.push_pipeline(folder)


def pipeline_folder(settings: Any) -> Path:
    """Where a run saves its pipeline."""
    return Path(settings.loop.output_dir) / "pipeline"


def fit_token_encoder(
    token_encoder: LDLMTokenEncoder, dataset: Dataset, settings: RunSettings, accelerator: Accelerator
) -> None:
    """Fills in the statistics of a frozen encoder, the same on all ranks."""
    if token_encoder.is_fitted:
        return
    token_encoder.to(accelerator.device)
    token_encoder.fit_statistics(statistics_batches(dataset, settings))
    # accelerators' sums may differ in the last bit from rank to rank
    broadcast([token_encoder.mean, token_encoder.std])


@torch.no_grad()
def fit_latent_statistics(
    objective: JointObjective, dataset: Dataset, settings: RunSettings, accelerator: Accelerator
) -> None:
    """Standardises the latents of a frozen autoencoder (COSMOS, Meshchaninov et al., 2025), the same on all ranks."""
    encoder, decoder = objective.latent_encoder, objective.latent_decoder
    if encoder.config.standardize_latents:
        return
    objective.to(accelerator.device)
    batches = (input_ids.to(accelerator.device) for input_ids in statistics_batches(dataset, settings))
    hidden_states = (objective.token_encoder(input_ids, return_dict=True).hidden_states for input_ids in batches)
    mean, std, _ = mean_and_std(encoder(some, return_dict=True).latents for some in hidden_states)
    broadcast([mean, std])
    for part in (encoder, decoder):
        part.set_latent_statistics(mean, std)


def statistics_batches(dataset: Dataset, settings: RunSettings) -> Sequence[torch.Tensor]:
    """Batches of token ids (B, L) of the training sequences that statistics are computed over."""
    sequences = training_sequences(dataset, settings.model.statistics_sequences)
    return sequences.split(settings.evaluation.batch_size)


def training_sequences(dataset: Dataset, count: int) -> torch.Tensor:
    """`count` training sequences (count, L): spread evenly over a data set, or the first ones of a stream."""
    if isinstance(dataset, IterableDataset):
        return torch.stack([item["input_ids"] for item in itertools.islice(dataset, count)])
    return held_out_sequences(dataset, count)


def check_sampler(settings: EvaluationSettings, scheduler: Any) -> None:
    """Raises ValueError before training, and not after it, for what the scheduler of the final samples refuses."""
    try:
        Sampler.parse(settings.sampler).scheduler_for(scheduler).set_timesteps(settings.num_inference_steps)
    except ValueError as error:
        raise ValueError(
            f"evaluation.sampler={settings.sampler!r} with evaluation.num_inference_steps="
            f"{settings.num_inference_steps}: {error}"
        ) from error


def check_judge(settings: EvaluationSettings) -> None:
    """Raises OSError before training, and not after it, where the judge of the final samples cannot be found."""
    if settings.judge is None or not settings.num_samples:
        return
    try:
        source = resolve_pretrained_source(settings.judge)
        if source.gguf_file is None:
            AutoConfig.from_pretrained(source.name_or_path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"evaluation.judge={settings.judge!r} cannot be loaded: {str(error).splitlines()[0]} Name another causal "
            "language model (Hub id, folder, package:NAME/FILE.gguf), or set evaluation.judge=null."
        ) from error


def print_overview(settings: Any, objective: nn.Module, sequence_length: int, accelerator: Accelerator) -> None:
    """Prints the merged settings, the size of each trained component and the tokens of a step."""
    device_batch_size, accumulation_steps = split_batch(settings.loop, accelerator.num_processes)
    tokens = settings.loop.batch_size * sequence_length
    accelerator.print(to_yaml(settings))
    for name, module in trained_components(objective):
        accelerator.print(f"{name}: {human_count(count_parameters(module))} parameters ({count_parameters(module):,})")
    accelerator.print(
        f"{tokens:,} tokens a step: {device_batch_size} sequences a device, {accelerator.num_processes} devices, "
        f"{accumulation_steps} accumulated passes, {sequence_length} tokens a sequence; "
        f"{human_count(tokens * settings.loop.max_steps)} tokens in {settings.loop.max_steps:,} steps"
    )


def estimate(
    objective: nn.Module, settings: LoopSettings, sequence_length: int, accelerator: Accelerator
) -> RunEstimate:
    """Counts the run's FLOPs, finds its devices' peak, and prints both, with the time that they come to."""
    device_batch_size, _ = split_batch(settings, accelerator.num_processes)
    peak = device_peak(accelerator.device, settings.mixed_precision, settings.peak_tflops)
    result = estimate_run(objective, settings, sequence_length, device_batch_size, accelerator.num_processes, peak)
    accelerator.print(result.summary())
    return result


def speed_up(objective: nn.Module, settings: LoopSettings) -> None:
    """Applies the settings `gradient_checkpointing` and `compile` to all trained components."""
    for _, module in trained_components(objective):
        if settings.gradient_checkpointing:
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
            elif module.supports_gradient_checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.compile:
            compile_blocks(module)


def load_text(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int, accelerator: Accelerator
) -> TextCorpora:
    """Training and held-out text; one process builds the cache."""
    with accelerator.main_process_first():
        corpora = load_corpora(
            settings,
            tokenizer,
            sequence_length,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
    check_held_out(corpora)
    return corpora


def check_held_out(corpora: TextCorpora) -> None:
    """Raises ValueError where the settings hold no text out."""
    if corpora.validation is None:
        raise ValueError(
            "Evaluation needs held-out text, and the settings hold none out: set data.validation_split, "
            "data.holdout_documents or data.holdout_fraction."
        )
