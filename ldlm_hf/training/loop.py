"""The training loop: it owns time (step, optimiser, EMA weights, checkpoints, log) and knows nothing of losses.

What is trained is a [`Recipe`]: it turns a batch into a loss, and a snapshot of the EMA weights into an evaluation.

The host waits for the device only in [`TrainingLoop.read_back`], which is called when something is logged or saved,
and when the recipe has to see what was observed. Between two of those it runs ahead, so that the device is never idle.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from .batches import TrainingBatches, global_rows
from .checkpoints import write_checkpoint
from .flops import RunEstimate
from .journal import Journal
from .randomness import RowRandomness
from .recipe import Evaluation, Recipe
from .run_folder import claim_output_dir
from .run_state import RunState
from .settings import LoopRunSettings, LoopSettings, OptimizerSettings
from .stopping import StopRequest


@dataclass
class TakenStep:
    """What an optimiser step has left on the device, until it is read back."""

    number: int  # from 1
    loss: torch.Tensor  # of all ranks
    gradient_norm: torch.Tensor  # of all ranks
    observations: tuple[torch.Tensor, ...]  # of this rank's passes, each (accumulated passes * n,)


class TrainingLoop:
    """Trains a recipe's module from the first step, or from a checkpoint, to the last.

    Args:
        recipe: what is trained.
        dataset: training sequences; items hold `input_ids` (L,), and those of pairs `given` (L,).
        accelerator: devices and precision.
        settings: the settings of the run, saved beside it.
        estimate: what the run costs, as [`flops.estimate_run`] counts it; None logs no share of the devices' peak.
        checkpoint: folder to go on from, as [`check_output_dir`] has found it; None starts anew.
        on_checkpoint: called on the main process with each checkpoint's folder.

    Raises:
        ValueError, OSError: settings or checkpoints that do not fit, before any step is taken.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset[dict[str, torch.Tensor]],
        accelerator: Accelerator,
        settings: LoopRunSettings,
        estimate: RunEstimate | None = None,
        checkpoint: Path | None = None,
        on_checkpoint: Callable[[Path], None] | None = None,
    ):
        self.recipe = recipe
        self.accelerator = accelerator
        self.settings = settings
        self.on_checkpoint = on_checkpoint
        self.device_batch_size, self.accumulation_steps = split_batch(settings.loop, accelerator.num_processes)
        self.batches = TrainingBatches(
            dataset,
            batch_size=settings.loop.batch_size,
            device_batch_size=self.device_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=settings.loop.seed,
            num_workers=settings.loop.dataloader_workers,
            shift_chunks=settings.loop.shift_chunks,
        )
        # a copy for evaluation, made before the module is sharded or wrapped
        self.snapshot = copy.deepcopy(recipe.module).to(accelerator.device) if accelerator.is_main_process else None
        self.state = RunState(recipe, self.batches, accelerator, settings.optimizer)
        self.journal = Journal(accelerator, settings, estimate)
        self.not_read_back: list[TakenStep] = []
        self.nonfinite_in_a_row = 0
        self.tokens_per_step = 0  # until the first batch
        if checkpoint is not None:
            self.state.load(checkpoint)

    def run(self, save: Callable[[nn.Module], None]) -> Evaluation | None:
        """Trains to the last step and returns the final evaluation; None if the run was asked to stop before.

        All processes return alike; the evaluation is the main process's. There, `save` is given the EMA weights before
        the evaluation, which may fail.
        """
        if self.accelerator.is_main_process:
            claim_output_dir(self.settings)
        self.accelerator.wait_for_everyone()
        self.journal.start(self.state.step)
        stopped = self.train()
        self.journal.progress.close()
        result = None
        if not stopped:
            self.update_snapshot()
            if self.snapshot is not None:
                save(self.snapshot)
            result = self.evaluate()
        self.accelerator.end_training()
        return result

    def train(self) -> bool:
        """Takes all steps that are left; whether it was asked to stop before the last."""
        state, loop = self.state, self.settings.loop
        evaluate_every = self.settings.evaluation.every
        state.module.train()
        started = time.perf_counter() - state.seconds
        stopped = False
        with StopRequest() as stop:
            while state.step < loop.max_steps and not stopped:
                values = self.train_step()
                state.step += 1
                self.journal.progress.update()
                is_last = state.step == loop.max_steps
                if is_last or state.step % loop.logging_steps == 0:
                    self.log(values)
                pause = time.perf_counter()
                state.seconds = pause - started
                stopped = not is_last and stop.agreed()
                if is_last or stopped or state.step % loop.checkpointing_steps == 0:
                    self.save_checkpoint(required=stopped)
                if evaluate_every and state.step % evaluate_every == 0 and not (is_last or stopped):
                    self.update_snapshot()
                    self.evaluate()
                self.journal.leave_out(time.perf_counter() - pause)
        if stopped:
            self.accelerator.print(
                f"stopped by {stop.signal_name or 'a signal to another process'} after step {state.step}; its "
                "checkpoint is saved. Go on with --resume_from_checkpoint latest."
            )
        return stopped

    def train_step(self) -> dict[str, torch.Tensor]:
        """One optimiser step over all accumulated batches, without a look at any result.

        A step whose loss or gradient is not finite leaves weights and optimisers as they were.
        """
        values, observations = self.accumulate_gradients()
        settings = self.settings.optimizer
        self.state.set_learning_rate(learning_rate_at(self.state.step, settings, self.settings.loop.max_steps))
        gradient_norm = self.accelerator.clip_grad_norm_(self.state.parameters, settings.max_grad_norm)
        if isinstance(gradient_norm, DTensor):
            gradient_norm = gradient_norm.full_tensor()
        # every rank sees the same norm and the same mean loss, so all of them skip or none does
        loss = self.accelerator.reduce(values["loss"], reduction="mean")
        self.state.update_weights(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        self.not_read_back.append(TakenStep(self.state.step + 1, loss, gradient_norm, observations))
        if len(self.not_read_back) == self.recipe.steps_until_observation():
            self.read_back()
        return {**values, "gradient_norm": gradient_norm}

    def accumulate_gradients(self) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        """Losses and gradients of one optimiser step's batches on this rank: means of the scalars, and observations
        of shape (accumulated passes * n,)."""
        step, loop = self.state.step, self.settings.loop
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        values: dict[str, torch.Tensor] = {}
        observations: list[tuple[torch.Tensor, ...]] = []
        for index in range(self.accumulation_steps):
            on_host = next(self.batches)
            batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in on_host.items()}
            input_ids = batch.pop("input_ids")
            self.tokens_per_step = loop.batch_size * input_ids.shape[1]
            rows = global_rows(index, rank, self.device_batch_size, num_processes)
            randomness = RowRandomness(loop.seed, step, rows, loop.batch_size)
            is_last = index == self.accumulation_steps - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.state.module):
                losses = self.recipe.losses(self.state.module, input_ids, step, randomness, **batch)
                self.accelerator.backward(losses.total / self.accumulation_steps)
            observations.append(losses.observations)
            for name, value in {"loss": losses.total, **losses.values}.items():
                share = value.detach() / self.accumulation_steps
                values[name] = values[name] + share if name in values else share
        return values, tuple(torch.cat(parts).detach() for parts in zip(*observations, strict=True))

    def read_back(self) -> None:
        """Brings what the steps since the last call have shown to the host, and to the recipe; waits for the
        device."""
        if not self.not_read_back:
            return
        steps, self.not_read_back = self.not_read_back, []
        scalars = torch.stack([torch.stack([step.loss, step.gradient_norm]) for step in steps]).tolist()
        gathered = [
            self.gather_rows(torch.stack(parts)) for parts in zip(*(step.observations for step in steps), strict=True)
        ]
        for index, (step, (loss, gradient_norm)) in enumerate(zip(steps, scalars, strict=True)):
            if gathered:
                self.recipe.observe(*(rows[index] for rows in gathered))
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                self.nonfinite_in_a_row = 0
            else:
                self.note_skipped_step(step.number, loss, gradient_norm)

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's observations of k steps (k, passes * n) → those of all ranks, in the whole batch's order, on
        the CPU."""
        of_a_pass = values.shape[1] // self.accumulation_steps
        shape = (-1, len(values), self.accumulation_steps, of_a_pass)  # (ranks, k, passes, n)
        return self.accelerator.gather(values).view(shape).permute(1, 2, 0, 3).flatten(1).cpu()

    def note_skipped_step(self, number: int, loss: float, gradient_norm: float) -> None:
        """Counts a step that was not finite; RuntimeError, with advice, after too many in a row."""
        loop = self.settings.loop
        self.state.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        self.journal.write({"step": number, "skipped": True, "loss": str(loss), "gradient_norm": str(gradient_norm)})
        self.accelerator.print(
            f"step {number}: loss {loss}, gradient norm {gradient_norm}: skipped "
            f"({self.nonfinite_in_a_row} in a row, {self.state.nonfinite_steps} in all)"
        )
        if self.nonfinite_in_a_row >= loop.max_nonfinite_steps:
            raise RuntimeError(
                f"{self.nonfinite_in_a_row} steps in a row were not finite (loop.max_nonfinite_steps="
                f"{loop.max_nonfinite_steps}); the weights are those of the last finite step. Go on from a "
                f"checkpoint before the first of them as a new run (--resume_from_checkpoint {loop.output_dir}/"
                "checkpoint-N loop.output_dir=ANOTHER), with a lower optimizer.learning_rate or "
                "objective.decoder_noise, a longer optimizer.lr_warmup_steps, or loop.mixed_precision=no."
            )

    def log(self, values: dict[str, torch.Tensor]) -> None:
        """Logs the last step."""
        self.read_back()
        step = self.state.step
        self.journal.log_step(
            step,
            values,
            self.recipe.log_values(step - 1),
            learning_rate_at(step - 1, self.settings.optimizer, self.settings.loop.max_steps),
            self.tokens_per_step,
            self.state.nonfinite_steps,
        )

    def update_snapshot(self) -> None:
        """Loads the EMA weights into the main process's snapshot; all processes take part."""
        self.read_back()
        self.state.copy_ema_weights(self.snapshot)
        if self.snapshot is not None:
            with torch.no_grad(), self.accelerator.autocast():
                self.recipe.complete(self.snapshot)

    def evaluate(self) -> Evaluation:
        """Evaluates the snapshot on the main process; the others wait."""
        result = Evaluation({})
        if self.snapshot is not None:
            with torch.no_grad(), self.accelerator.autocast():
                result = self.recipe.evaluate(self.snapshot, self.state.step)
        self.journal.log_evaluation(self.state.step, result, self.recipe.log_values(self.state.step - 1))
        self.accelerator.wait_for_everyone()
        return result

    def save_checkpoint(self, required: bool) -> None:
        """Saves all that a resumed run needs; training goes on where that fails, unless it is `required`."""
        self.read_back()
        is_main = self.accelerator.is_main_process
        try:
            checkpoint = write_checkpoint(
                Path(self.settings.loop.output_dir),
                self.state.step,
                self.settings.loop.checkpoints_total_limit,
                is_main,
                self.state.save,
                lambda problem: next((one for one in gather_object([problem]) if one is not None), None),
            )
        except OSError as error:
            if required:
                raise
            self.journal.write({"step": self.state.step, "checkpoint_failed": str(error)})
            self.accelerator.print(f"{error} Training goes on, and the next checkpoint is tried as usual.")
            return
        if is_main and self.on_checkpoint is not None:
            self.on_checkpoint(checkpoint)


def split_batch(settings: LoopSettings, world_size: int) -> tuple[int, int]:
    """Sequences of one pass on one device, and passes that are accumulated to the whole batch."""
    if settings.batch_size % world_size:
        raise ValueError(
            f"loop.batch_size={settings.batch_size} does not split evenly over {world_size} devices; use a multiple."
        )
    on_device = settings.batch_size // world_size
    device_batch_size = min(settings.device_batch_size, on_device)
    if on_device % device_batch_size:
        raise ValueError(
            f"loop.batch_size={settings.batch_size} on {world_size} devices is {on_device} sequences a device, which "
            f"loop.device_batch_size={settings.device_batch_size} does not divide; choose a divisor of {on_device}."
        )
    return device_batch_size, on_device // device_batch_size


def learning_rate_at(step: int, settings: OptimizerSettings, max_steps: int) -> float:
    """Linear warmup from the initial learning rate, then constant up to the last steps' linear decay to zero."""
    progress = min(1.0, step / settings.lr_warmup_steps) if settings.lr_warmup_steps else 1.0
    remaining = min(1.0, (max_steps - step) / settings.lr_decay_steps) if settings.lr_decay_steps else 1.0
    rise = settings.learning_rate - settings.initial_learning_rate
    return remaining * (settings.initial_learning_rate + progress * rise)
