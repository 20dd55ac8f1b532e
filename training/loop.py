"""The training loop: it owns time (step, optimiser, averaged weights, checkpoints, log) and knows nothing of losses.

What is trained is a [`Task`]: it turns a batch into a loss, and a snapshot of the averaged weights into an evaluation.

The host waits for the device only in [`TrainingLoop.read_back`], which is called when something is logged or saved,
and when the task has to see what was observed. Between two of those it runs ahead, so that the device is never idle.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from accelerate import Accelerator
from batches import TrainingBatches, global_rows
from checkpoints import write_checkpoint
from flops import RunEstimate
from model_card import samples_text
from randomness import RowRandomness
from run_folder import METRICS, MetricsLog, claim_output_dir
from settings import LoopSettings, OptimizerSettings, flatten
from stopping import StopRequest
from task import Evaluation, Task
from tracking import log_figure, log_samples, loss_over_time_figure, start_trackers


TRAINED_WEIGHTS = "model.safetensors"


@dataclass
class TakenStep:
    """What an optimiser step has left on the device, until it is read back.

    Attributes:
        number: of the step, from 1.
        loss, gradient_norm: scalars, the same on all ranks.
        observations: of this rank's rows, each of shape (accumulated passes * B,).
    """

    number: int
    loss: torch.Tensor
    gradient_norm: torch.Tensor
    observations: tuple[torch.Tensor, ...]


class TrainingLoop:
    """Trains a task's module from the first step, or from a checkpoint, to the last.

    Args:
        task: what is trained.
        dataset: training sequences; items hold `input_ids` (L,).
        estimate: what the run costs, see [`launch.estimate`].
        accelerator: devices and precision.
        settings: the merged settings of the run, saved beside it; they have the sections `loop`, `optimizer` and
            `evaluation`.
        checkpoint: folder to go on from, as [`check_output_dir`] has found it; None starts anew.
        overwrite: a new run deletes another one that the output folder holds.
        on_checkpoint: called on the main process with each checkpoint's folder.

    Raises:
        ValueError, OSError: settings or checkpoints that do not fit, before any step is taken.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset[dict[str, torch.Tensor]],
        estimate: RunEstimate,
        accelerator: Accelerator,
        settings: Any,
        checkpoint: Path | None = None,
        overwrite: bool = False,
        on_checkpoint: Callable[[Path], None] | None = None,
    ):
        self.task = task
        self.estimate = estimate
        self.accelerator = accelerator
        self.settings = settings
        self.loop: LoopSettings = settings.loop
        self.output_dir = Path(self.loop.output_dir)
        self.on_checkpoint = on_checkpoint
        self.device_batch_size, self.accumulation_steps = split_batch(self.loop, accelerator.num_processes)
        self.place = (accelerator.process_index, self.device_batch_size, accelerator.num_processes)
        self.step = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints included, over all resumed parts
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.not_read_back: list[TakenStep] = []
        self.batches = TrainingBatches(
            dataset,
            batch_size=self.loop.batch_size,
            device_batch_size=self.device_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=self.loop.seed,
            num_workers=self.loop.dataloader_workers,
        )
        self.metrics_log = MetricsLog(self.output_dir / METRICS)

        # a copy for evaluation, made before the module is sharded or wrapped
        self.snapshot = copy.deepcopy(task.module).to(accelerator.device) if accelerator.is_main_process else None
        self.frozen = {name for name, parameter in task.module.named_parameters() if not parameter.requires_grad}
        self.optimizer = build_optimizer(task.module, settings.optimizer)
        self.module, self.optimizer = accelerator.prepare(task.module, self.optimizer)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.local_parameters(), decay=settings.optimizer.ema_decay, foreach=True)
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP
        accelerator.register_save_state_pre_hook(self.save_trained_weights)
        accelerator.register_load_state_pre_hook(self.load_trained_weights)
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        # last, so that a folder is left as it was where its checkpoint is refused
        if accelerator.is_main_process:
            claim_output_dir(settings, delete_other_run=overwrite and checkpoint is None)
        accelerator.wait_for_everyone()

    def run(self, save: Callable[[nn.Module], None]) -> Evaluation | None:
        """Trains to the last step and returns the final evaluation; None if the run was asked to stop before.

        All processes return alike; the evaluation is the main process's.

        Args:
            save: is given the averaged weights on the main process at the end, before the evaluation, which may fail.
        """
        self.start_logs()
        progress = tqdm(
            total=self.loop.max_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            desc="training",
            dynamic_ncols=True,
            # in a log file each update is a line of its own
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        self.module.train()
        evaluate_every = self.settings.evaluation.every
        started = since = time.perf_counter()
        seconds_before, steps_since = self.seconds, 0
        stopped = False
        with StopRequest() as stop:
            while self.step < self.loop.max_steps and not stopped:
                values = self.train_step()
                self.step += 1
                steps_since += 1
                progress.update()
                last = self.step == self.loop.max_steps
                if last or self.step % self.loop.logging_steps == 0:
                    self.read_back()
                    tokens = steps_since * self.estimate.tokens_per_step
                    self.log(values, tokens / (time.perf_counter() - since), progress)
                    since, steps_since = time.perf_counter(), 0
                pause = time.perf_counter()
                self.seconds = seconds_before + pause - started
                stopped = not last and stop.agreed()
                if last or stopped or self.step % self.loop.checkpointing_steps == 0:
                    self.save_checkpoint(required=stopped)
                if evaluate_every and self.step % evaluate_every == 0 and not (last or stopped):
                    self.update_snapshot()
                    self.evaluate()
                since += time.perf_counter() - pause
        progress.close()
        if stopped:
            self.accelerator.print(
                f"stopped by {stop.signal_name or 'a signal to another process'} after step {self.step}; its "
                "checkpoint is saved. Go on with --resume_from_checkpoint latest."
            )
        result = None
        if not stopped:
            self.update_snapshot()
            if self.snapshot is not None:
                save(self.snapshot)
            result = self.evaluate()
        self.accelerator.end_training()
        return result

    def train_step(self) -> dict[str, torch.Tensor]:
        """One optimiser step over all accumulated batches, without a look at any result.

        A step whose loss or gradient is not finite leaves weights and optimiser as they were: fused AdamW skips its
        update where `found_inf` says so, on the device.
        """
        totals: dict[str, torch.Tensor] = {}
        observations: list[tuple[torch.Tensor, ...]] = []
        for index in range(self.accumulation_steps):
            input_ids = next(self.batches)["input_ids"].to(self.accelerator.device, non_blocking=True)
            rows = global_rows(index, *self.place)
            randomness = RowRandomness(self.loop.seed, self.step, rows, self.loop.batch_size)
            last = index == self.accumulation_steps - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                losses = self.task.losses(self.module, input_ids, self.step, randomness)
                self.accelerator.backward(losses.total / self.accumulation_steps)
            observations.append(losses.observations)
            for name, value in {"loss": losses.total, **losses.values}.items():
                share = value.detach() / self.accumulation_steps
                totals[name] = totals[name] + share if name in totals else share

        learning_rate = learning_rate_at(self.step, self.settings.optimizer, self.settings.loop.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        max_grad_norm = self.settings.optimizer.max_grad_norm
        gradient_norm = whole(self.accelerator.clip_grad_norm_(self.parameters, max_grad_norm))
        # every rank sees the same norm and the same mean loss, so all of them skip or none does
        loss = self.accelerator.reduce(totals["loss"], reduction="mean")
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        self.optimizer.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.local_parameters())
        self.not_read_back.append(
            TakenStep(
                self.step + 1,
                loss,
                gradient_norm,
                tuple(torch.cat(parts).detach() for parts in zip(*observations, strict=True)),
            )
        )
        if len(self.not_read_back) == self.task.steps_until_observation():
            self.read_back()
        return {**totals, "gradient_norm": gradient_norm}

    def local_parameters(self) -> list[torch.Tensor]:
        """The trained parameters; of sharded ones this rank's part, since averaging knows plain tensors only."""
        return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in self.parameters]

    def read_back(self) -> None:
        """Brings what the steps since the last call have shown to the host, and to the task; waits for the device."""
        if not self.not_read_back:
            return
        steps, self.not_read_back = self.not_read_back, []
        scalars = torch.stack([torch.stack([step.loss, step.gradient_norm]) for step in steps]).tolist()
        gathered = [
            self.gather_rows(torch.stack(parts)) for parts in zip(*(step.observations for step in steps), strict=True)
        ]
        for index, (step, (loss, gradient_norm)) in enumerate(zip(steps, scalars, strict=True)):
            if gathered:
                self.task.observe(*(rows[index] for rows in gathered))
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                self.nonfinite_in_a_row = 0
            else:
                self.note_skipped_step(step.number, loss, gradient_norm)

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's rows of k steps (k, passes * B) → those of all ranks, in the whole batch's order, on the CPU."""
        shape = (-1, len(values), self.accumulation_steps, self.device_batch_size)  # (ranks, k, passes, B)
        return self.accelerator.gather(values).view(shape).permute(1, 2, 0, 3).flatten(1).cpu()

    def note_skipped_step(self, number: int, loss: float, gradient_norm: float) -> None:
        """Counts a step that was not finite; RuntimeError, with advice, after too many in a row."""
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        self.write_record({"step": number, "skipped": True, "loss": str(loss), "gradient_norm": str(gradient_norm)})
        self.accelerator.print(
            f"step {number}: loss {loss}, gradient norm {gradient_norm}: skipped "
            f"({self.nonfinite_in_a_row} in a row, {self.nonfinite_steps} in all)"
        )
        if self.nonfinite_in_a_row >= self.loop.max_nonfinite_steps:
            raise RuntimeError(
                f"{self.nonfinite_in_a_row} steps in a row were not finite (loop.max_nonfinite_steps="
                f"{self.loop.max_nonfinite_steps}); the weights are those of the last finite step. Go on from a "
                f"checkpoint before the first of them as a new run (--resume_from_checkpoint {self.output_dir}/"
                "checkpoint-N loop.output_dir=ANOTHER), with a lower optimizer.learning_rate or "
                "objective.decoder_noise, a longer optimizer.lr_warmup_steps, or loop.mixed_precision=no."
            )

    def start_logs(self) -> None:
        """Starts the trackers, and takes the log back to the step that the run goes on from."""
        if self.loop.trackers:
            plain = flatten(asdict(self.settings))
            config = {key: value if isinstance(value, (int, float)) else str(value) for key, value in plain.items()}
            start_trackers(self.accelerator, self.output_dir, config, resumed=self.step > 0)
        if self.accelerator.is_main_process:
            self.metrics_log.rewind(self.step)

    def log(self, values: dict[str, torch.Tensor], tokens_per_second: float, progress: tqdm) -> None:
        """Writes one line of the log: means over all ranks, and the task's own numbers."""
        means = self.accelerator.reduce(torch.stack([value.float() for value in values.values()]), reduction="mean")
        reduced = dict(zip(values, means.tolist(), strict=True))
        record = {
            "step": self.step,
            **{name: value for name, value in reduced.items() if math.isfinite(value)},
            "learning_rate": learning_rate_at(self.step - 1, self.settings.optimizer, self.settings.loop.max_steps),
            **self.task.log_values(self.step - 1),
            "tokens": self.step * self.estimate.tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "model_flops_utilization": self.estimate.model_flops_utilization(tokens_per_second),
            "hours_left": self.estimate.seconds_left(self.step, tokens_per_second) / 3600,
            "skipped_steps": self.nonfinite_steps,
        }
        self.write_record(record)
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=self.step)
        losses = {name.removesuffix("_loss"): f"{value:.3f}" for name, value in reduced.items() if "loss" in name}
        rates = {"tokens/s": f"{tokens_per_second:.0f}", "MFU": f"{record['model_flops_utilization']:.1%}"}
        progress.set_postfix(losses | rates, refresh=False)

    def write_record(self, record: dict[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`, or says why it has to wait."""
        if self.accelerator.is_main_process:
            problem = self.metrics_log.write(record)
            if problem is not None:
                tqdm.write(
                    f"step {record['step']}: metrics.jsonl could not be written ({problem}); trying again later"
                )

    def update_snapshot(self) -> None:
        """Loads the averaged weights into the main process's snapshot; all processes take part."""
        self.read_back()
        self.ema.store(self.local_parameters())
        self.ema.copy_to(self.local_parameters())
        state = self.accelerator.get_state_dict(self.module)
        if self.snapshot is not None:
            self.snapshot.load_state_dict(state)
            self.snapshot.eval()
        self.ema.restore(self.local_parameters())

    def evaluate(self) -> Evaluation:
        """Evaluates the snapshot on the main process; the others wait."""
        result = Evaluation({})
        if self.snapshot is not None:
            with torch.no_grad(), self.accelerator.autocast():
                result = self.task.evaluate(self.snapshot, self.step)
            self.write_record({"step": self.step, **{f"eval/{name}": value for name, value in result.values.items()}})
            summary = {name: value for name, value in result.values.items() if "/" not in name}
            summary |= self.task.log_values(self.step - 1)
            listed = ", ".join(f"{name} {value:.4f}" for name, value in summary.items())
            tqdm.write(f"held-out text after {self.step} steps: {listed}")
            self.show(result)
        self.accelerator.log({f"eval/{name}": value for name, value in result.values.items()}, step=self.step)
        self.accelerator.wait_for_everyone()
        return result

    def show(self, result: Evaluation) -> None:
        """Samples as a file, and samples and the loss over t to the trackers."""
        if result.texts:
            preview = self.output_dir / f"samples-{self.step}.md"
            try:
                preview.write_text(samples_text(result.texts, f"Samples at step {self.step}"), encoding="utf-8")
            except OSError as error:
                tqdm.write(f"{preview.name} could not be written: {error}")
            log_samples(self.accelerator, result.texts, self.step)
        if result.loss_over_time and self.loop.trackers:
            figure = loss_over_time_figure(result.loss_over_time, self.step)
            log_figure(self.accelerator, "diffusion_loss_over_t", figure, self.step)

    def save_checkpoint(self, required: bool) -> None:
        """Saves all that a resumed run needs. Where that fails, training goes on, unless the checkpoint is required.

        Raises:
            OSError: a required checkpoint could not be written.
        """
        self.read_back()
        is_main = self.accelerator.is_main_process
        try:
            checkpoint = write_checkpoint(
                self.output_dir,
                self.step,
                self.loop.checkpoints_total_limit,
                is_main,
                self.save_state,
                lambda problem: next((one for one in gather_object([problem]) if one is not None), None),
            )
        except OSError as error:
            if required:
                raise
            self.write_record({"step": self.step, "checkpoint_failed": str(error)})
            self.accelerator.print(f"{error} Training goes on, and the next checkpoint is tried as usual.")
            return
        if is_main and self.on_checkpoint is not None:
            self.on_checkpoint(checkpoint)

    def save_state(self, folder: Path) -> None:
        """Writes the state of the run into a folder: once, and what differs between ranks for each of them.

        Random states are not part of it: all that is random depends on seed, step and row.
        """
        rank, is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.accelerator.save_state(str(folder))
        if is_main or self.is_sharded:
            save_file(self.averaged_weights(), folder / self.averaged_weights_name(rank))
        # the task's state is the same for all of them, and is there to be compared
        rank_state = {"data": self.batches.state_dict(), "task": self.task.state_dict()}
        torch.save(rank_state, folder / f"rank_{rank}.pt")
        if is_main:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "nonfinite_steps": self.nonfinite_steps,
                "world_size": self.accelerator.num_processes,
                "is_sharded": self.is_sharded,
                "ema_step": self.ema.optimization_step,
            }
            torch.save(state, folder / "run_state.pt")

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Takes over a checkpoint's state.

        Raises:
            ValueError: it was written by another kind of run, or its data's position belongs to another layout.
        """
        rank = self.accelerator.process_index
        state = torch.load(checkpoint / "run_state.pt", map_location="cpu", weights_only=True)
        layout = (state["world_size"], state["is_sharded"])
        present = (self.accelerator.num_processes, self.is_sharded)
        if layout != present and (state["is_sharded"] or self.is_sharded):
            raise ValueError(
                f"{checkpoint} was written by {layout[0]} processes ({'sharded' if layout[1] else 'not sharded'}), "
                f"and this run has {present[0]} ({'sharded' if present[1] else 'not sharded'}): averaged weights that "
                "are sharded belong to their layout. Resume with the same one."
            )
        own = checkpoint / f"rank_{rank}.pt"
        # of a rank that did not exist then; positions that depend on the rank are refused by `load_state_dict`
        rank_state_file = own if own.is_file() else checkpoint / "rank_0.pt"
        rank_state = torch.load(rank_state_file, map_location="cpu", weights_only=True)
        self.batches.load_state_dict(rank_state["data"])
        self.task.load_state_dict(rank_state["task"])
        self.accelerator.load_state(str(checkpoint))
        for group in self.optimizer.param_groups:
            # a checkpoint brings those of its own run, which a new one may have gone on from with others
            group.update(adamw_arguments(self.settings.optimizer))
        self.load_averaged_weights(load_file(checkpoint / self.averaged_weights_name(rank)))
        self.ema.optimization_step = state["ema_step"]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.nonfinite_steps = state["nonfinite_steps"]
        self.accelerator.print(f"resumed from {checkpoint} at step {self.step}")
        if state["world_size"] != self.accelerator.num_processes:
            self.accelerator.print(
                f"it was written by {state['world_size']} processes, and {self.accelerator.num_processes} go on: the "
                "same batches and the same noise, summed in another order"
            )

    def averaged_weights_name(self, rank: int) -> str:
        """File of the averaged weights; sharded ones have a file for each rank."""
        return f"averaged_weights_{rank}.safetensors" if self.is_sharded else "averaged_weights.safetensors"

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """This rank's averaged weights, by their place among the trained parameters."""
        return {str(index): weight.contiguous() for index, weight in enumerate(self.ema.shadow_params)}

    def load_averaged_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes them over."""
        for index, weight in enumerate(self.ema.shadow_params):
            weight.copy_(weights[str(index)])

    def save_trained_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        """accelerate's hook before saving: the frozen language model comes from its own source, so leave it out."""
        # a sharded model is saved by accelerate itself, and `weights` is empty
        while weights:
            state = {name.removeprefix("module."): value for name, value in weights.pop().items()}
            if self.accelerator.is_main_process:
                trained = {name: value.contiguous() for name, value in state.items() if name not in self.frozen}
                save_file(trained, Path(folder) / TRAINED_WEIGHTS)

    def load_trained_weights(self, models: list[nn.Module], folder: str) -> None:
        """accelerate's hook before loading."""
        while models:
            module = self.accelerator.unwrap_model(models.pop())
            found = module.load_state_dict(load_file(Path(folder) / TRAINED_WEIGHTS), strict=False)
            missing = set(found.missing_keys) - self.frozen
            if missing or found.unexpected_keys:
                raise ValueError(
                    f"{folder} holds other weights than this run trains: missing {sorted(missing)[:3]}, unexpected "
                    f"{sorted(found.unexpected_keys)[:3]}."
                )


def split_batch(settings: LoopSettings, world_size: int) -> tuple[int, int]:
    """Sequences of one pass on one device, and passes that are accumulated to the whole batch.

    Raises:
        ValueError: the batch does not split evenly.
    """
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


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over all trained parameters (App. C)."""
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.initial_learning_rate,
        fused=True,
        **adamw_arguments(settings),
    )


def adamw_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """What AdamW keeps beside the learning rate, which every step sets."""
    return {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def learning_rate_at(step: int, settings: OptimizerSettings, max_steps: int) -> float:
    """Linear warmup from the initial learning rate, then constant up to the last steps' linear decay to zero."""
    progress = min(1.0, step / settings.lr_warmup_steps) if settings.lr_warmup_steps else 1.0
    remaining = min(1.0, (max_steps - step) / settings.lr_decay_steps) if settings.lr_decay_steps else 1.0
    rise = settings.learning_rate - settings.initial_learning_rate
    return remaining * (settings.initial_learning_rate + progress * rise)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
