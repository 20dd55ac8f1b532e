"""From the command line of a training script to a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import DataSettings, StreamedTokenChunks, TokenChunks, load_corpora
from ..evaluation.markdown import human_count
from ..evaluation.real_text import held_out_part
from ..evaluation.samplers import Sampler
from ..loading.pretrained_sources import resolve_pretrained_source
from ..loading.settings_reader import load_settings, to_yaml
from .components import compile_blocks, count_parameters, trained_components
from .devices import build_accelerator
from .finish import finish_run
from .flops import device_peak, estimate_run
from .hub_upload import HubUploads, add_hub_arguments
from .loop import TrainingLoop, split_batch
from .recipe import PipelineRecipe
from .run_folder import check_output_dir, delete_run
from .settings import EvaluationSettings, LoopSettings, TrainingSettings
from .tracking import check_trackers


def run(recipe_class: type[PipelineRecipe], description: str) -> None:
    """Trains a recipe as the command line says, and scores the pipeline that comes out of it.

    Raises:
        ValueError, OSError: before any training, where settings, text or folders would stop it later.
    """
    arguments = parse_arguments(description)
    settings: TrainingSettings = load_settings(recipe_class.settings_class, arguments.config, arguments.overrides)
    accelerator = build_accelerator(settings.loop)
    # every rank starts from the same weights
    set_seed(settings.loop.seed)
    recipe = recipe_class(settings, accelerator)
    recipe.load()
    if arguments.dry_run:
        print_overview(settings, recipe.module, recipe.sequence_length, accelerator)
        return

    checkpoint, uploads = prepare_run(arguments, settings, accelerator, recipe.expected_scheduler())
    train, held_out = load_text(settings.data, recipe.tokenizer, recipe.sequence_length, accelerator)
    recipe.build(train, held_out)
    speed_up(recipe.module, settings.loop)
    print_overview(settings, recipe.module, recipe.sequence_length, accelerator)
    peak = device_peak(accelerator.device, settings.loop.mixed_precision, settings.loop.peak_tflops)
    estimate = estimate_run(recipe.module, settings.loop, recipe.sequence_length, accelerator.num_processes, peak)
    accelerator.print(estimate.summary())
    loop = TrainingLoop(
        recipe,
        train,
        accelerator,
        settings,
        estimate,
        checkpoint,
        on_checkpoint=uploads.push_checkpoint if uploads is not None and arguments.push_checkpoints else None,
    )
    # after the constructor, so that a folder is left as it was where a checkpoint is refused
    if arguments.overwrite_output_dir and checkpoint is None and accelerator.is_main_process:
        delete_run(Path(settings.loop.output_dir))
    folder = Path(settings.loop.output_dir) / recipe.result_folder
    evaluation = loop.run(save=lambda snapshot: recipe.save(snapshot, folder))
    if evaluation is None or not accelerator.is_main_process:
        return
    pipeline = recipe.pipeline(loop.snapshot)
    if pipeline is None:
        print(recipe.next_command(folder))
        return
    finish_run(
        pipeline,
        held_out,
        settings,
        evaluation.values,
        loop.state.seconds,
        license=arguments.license,
        language=arguments.language,
        model_id=uploads.model_id if uploads is not None and arguments.push_to_hub else None,
    )
    if uploads is not None and arguments.push_to_hub:
        uploads.push_pipeline(folder)


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


def prepare_run(
    arguments: argparse.Namespace,
    settings: TrainingSettings,
    accelerator: Accelerator,
    scheduler: SchedulerMixin | None,
) -> tuple[Path | None, HubUploads | None]:
    """Finds out, before any work is done, what would stop the run later: folder, checkpoint, trackers, sampler, judge,
    Hub. Returns the checkpoint to go on from and, on the main process, where to upload to, if there are such.
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


def check_sampler(settings: EvaluationSettings, scheduler: SchedulerMixin) -> None:
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


def print_overview(
    settings: TrainingSettings, objective: nn.Module, sequence_length: int, accelerator: Accelerator
) -> None:
    """Prints the merged settings, the size of each trained component and the tokens of a step."""
    device_batch_size, accumulation_steps = split_batch(settings.loop, accelerator.num_processes)
    tokens = settings.loop.batch_size * sequence_length
    accelerator.print(to_yaml(settings))
    for name, module in trained_components(objective):
        count = count_parameters(module, trained_only=True)
        accelerator.print(f"{name}: {human_count(count)} parameters ({count:,})")
    accelerator.print(
        f"{tokens:,} tokens a step: {device_batch_size} sequences a device, {accelerator.num_processes} devices, "
        f"{accumulation_steps} accumulated passes, {sequence_length} tokens a sequence; "
        f"{human_count(tokens * settings.loop.max_steps)} tokens in {settings.loop.max_steps:,} steps"
    )


def speed_up(objective: nn.Module, settings: LoopSettings) -> None:
    """Applies the settings `gradient_checkpointing`, to all trained components, and `compile`, to all of ours."""
    for _, module in trained_components(objective):
        if settings.gradient_checkpointing:
            if isinstance(module, ModelMixin):
                module.enable_gradient_checkpointing()
            elif isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        for module in objective.children():
            compile_blocks(module, getattr(objective, "batch_sizes_vary", False))


def load_text(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int, accelerator: Accelerator
) -> tuple[TokenChunks | StreamedTokenChunks, TokenChunks]:
    """Training and held-out text; one process builds the cache."""
    with accelerator.main_process_first():
        corpora = load_corpora(
            settings,
            tokenizer,
            sequence_length,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
    return corpora.train, held_out_part(corpora)
