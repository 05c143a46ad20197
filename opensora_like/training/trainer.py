"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.plan import EpochPlan, Position, advance, steps_in_epoch
from opensora_like.runtime import MetricWriter, Runtime, StopSignal, logger, mean_over_ranks
from opensora_like.training.ema import EMA
from opensora_like.training.garbage import GarbageControl
from opensora_like.training.optim import Rates
from opensora_like.training.spikes import SpikeGuard
from opensora_like.training.throughput import Throughput
from opensora_like.training.validation import Watch


@dataclass
class Schedule:
    """What is due when, in updates.

    Args:
        total_steps: updates in all; the loop ends there. None: it ends after `epochs`, whose number of steps
            depends on draws.
        accumulation_steps: micro-batches per rank and update.
        rates: learning rate and weight decay of each update.
        ckpt_every: 0 saves at the end only.
    """

    total_steps: int | None
    epochs: int
    accumulation_steps: int
    rates: Rates
    log_every: int
    ckpt_every: int

    def is_done(self, state: TrainState) -> bool:
        """Whether the last update was made."""
        return state.epoch >= self.epochs if self.total_steps is None else state.step >= self.total_steps


@dataclass
class Run:
    """Everything a loop needs, built.

    Args:
        plan_of: epoch -> its plan.
        on_batch: hears of every batch before it is used.
        weights_of: first batch of a step -> what the loss of each of this rank's micro-batches is multiplied with.
        lock: an open file that keeps other runs out of the folder; closed at the end.
        watch: validates and samples; None where nothing does.
        gc_every: see `GarbageControl`.
        throughput: what a batch costs.
        spikes: notices gradient norms that are out of the usual.
        before_step: told the number of each update, from 0, before it. Returns: whose it is where models take turns;
            metrics of such steps end in it.
    """

    runtime: Runtime
    schedule: Schedule
    booster: Booster
    step_fn: Callable[[Batch], Tensor]
    batches: Iterator[Batch]
    plan_of: Callable[[int], EpochPlan]
    checkpoints: CheckpointManager
    writers: list[MetricWriter]
    ema: EMA | None
    state: TrainState
    on_batch: Callable[[Batch], None]
    weights_of: Callable[[Batch], Sequence[float]]
    throughput: Throughput
    spikes: SpikeGuard
    lock: TextIO | None = None
    watch: Watch | None = None
    gc_every: int = 0
    before_step: Callable[[int], str] = lambda step: ""


def train(run: Run) -> bool:
    """Train from ``run.state`` to the last step.

    Returns: True when the last step was reached, False when a signal ended the run early; both have saved.

    Raises:
        FloatingPointError: a loss or gradient is not finite; weights and checkpoints are those of the step before.
        OSError: a checkpoint could not be written, and errors stop the run, or it was the last one.
    """
    state, schedule, booster = run.state, run.schedule, run.booster
    garbage = GarbageControl(run.gc_every)
    with closing(garbage), closing(Meter(run)) as meter, closing(StopSignal()) as stop, run.lock or nullcontext():
        if run.watch is not None:
            meter.off_the_clock(run.watch.begin)
        while not schedule.is_done(state):
            role = run.before_step(state.step)
            schedule.rates.set_on(booster.param_groups, state.step)
            seen: list[tuple[Batch, Tensor]] = []
            weights: Sequence[float] = ()
            for micro in range(schedule.accumulation_steps):
                batch = meter.next_batch(run.batches)
                run.on_batch(batch)
                weights = weights or run.weights_of(batch)
                with booster.micro_batch(last=micro == schedule.accumulation_steps - 1):
                    loss = run.step_fn(batch)
                    booster.backward(_spread_non_finite(loss) * weights[micro] / schedule.accumulation_steps)
                seen.append((batch, loss.detach()))
            grad_norm = booster.step()
            if not math.isfinite(grad_norm):  # before anything is averaged, written or saved
                raise FloatingPointError(describe_non_finite(grad_norm, seen, state.step + 1))

            if (usual := run.spikes.usual(grad_norm, role)) is not None:
                logger.warning("%s", describe_spike(grad_norm, usual, seen, state.step + 1))
            _advance(run, first=seen[0][0])
            if run.ema is not None:
                run.ema.update(state.step)
            meter.after_step(seen, weights, grad_norm, role)
            garbage.after_step(state.step)
            run.checkpoints.check()
            stopping = stop.agreed()
            if stopping or schedule.is_done(state) or is_due(state.step, schedule.ckpt_every):
                run.checkpoints.save(state)
            if stopping:
                break
            if run.watch is not None:
                meter.off_the_clock(run.watch.after_step)
        run.checkpoints.finish()
    return schedule.is_done(state)


def _spread_non_finite(loss: Tensor) -> Tensor:
    """`loss`; where it overflowed and its gradient did not, that becomes NaN, which all ranks see in the norm."""
    return loss * (1 + 0 * loss.detach())


def _advance(run: Run, *, first: Batch) -> None:
    """Move the state past the update that `first` was this rank's first micro-batch of."""
    state, plan = run.state, run.plan_of(first.epoch)
    micro_per_step = run.booster.dp_size * run.schedule.accumulation_steps
    begin = first.index - run.booster.dp_rank
    buckets = plan.bucket_ids[begin : begin + micro_per_step]
    state.step += 1
    state.samples += int(plan.buckets.batch_sizes[buckets].sum())
    state.epoch, state.micro_batch = advance(Position(first.epoch, begin), len(plan), micro_per_step)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` updates happens after update `step`; 0 is never."""
    return every > 0 and step % every == 0


Seen = tuple[float, list[int], list[str]]  # loss, rows and paths of a micro-batch


def of_all_ranks(seen: list[tuple[Batch, Tensor]]) -> list[Seen]:
    """What every rank saw in a step; all ranks call it."""
    own = [(loss.item(), batch.rows, batch.paths) for batch, loss in seen]
    everyone: list[list[Seen]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return [entry for rank in everyone for entry in rank]


def describe(found: list[Seen]) -> str:
    return "; ".join(f"loss {loss} of rows {rows} {paths}" for loss, rows, paths in found)


def describe_non_finite(grad_norm: float, seen: list[tuple[Batch, Tensor]], step: int) -> str:
    """Which samples to look at, gathered from all ranks, when a gradient norm is not finite."""
    found = of_all_ranks(seen)
    guilty = [entry for entry in found if not math.isfinite(entry[0])] or found
    return (
        f"grad_norm is {grad_norm} at step {step}; weights and checkpoints are those of step {step - 1}. "
        f"samples: {describe(guilty)}. lower optim.lr, or look at these files, and resume with --load latest"
    )


def describe_spike(grad_norm: float, usual: float, seen: list[tuple[Batch, Tensor]], step: int) -> str:
    """Which samples to look at when a gradient norm is finite and far above the usual one."""
    return (
        f"grad_norm {grad_norm:.3g} at step {step} is {grad_norm / usual:.1f} times the usual {usual:.3g}; samples: "
        f"{describe(of_all_ranks(seen))}. look at these files; dataset.quarantine leaves rows out"
    )


def metrics_of(role: str, loss: float, grad_norm: float, lr: float) -> dict[str, float]:
    """What is logged of a step, by names that say whose it was."""
    suffix = f"_{role}" if role else ""
    return {f"loss{suffix}": loss, f"grad_norm{suffix}": grad_norm, f"lr{suffix}": lr}


class Meter:
    """Times the loop, shows the bar, writes the metrics. The loss logged is the step's own, over all ranks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._started = time.perf_counter()
        self._waited = 0.0
        self._tokens = self._flops = 0.0
        self._newest: dict[str, tuple[Tensor, float, float]] = {}  # role -> loss, grad_norm, lr of its last step
        self._steps, self._samples = 0, run.state.samples
        self._bar = tqdm(
            total=run.schedule.total_steps,
            initial=run.state.step,
            disable=not run.runtime.is_main,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
        )
        self._show_epoch()

    def _show_epoch(self) -> None:
        """Where the steps of the whole run are not known, the bar ends with the epoch, whose steps are."""
        run, state = self._run, self._run.state
        if run.schedule.total_steps is None and run.runtime.is_main and not run.schedule.is_done(state):
            micro_per_step = run.booster.dp_size * run.schedule.accumulation_steps
            left = steps_in_epoch(len(run.plan_of(state.epoch)), micro_per_step, state.micro_batch)
            self._bar.total = state.step + left
            self._bar.set_description(f"epoch {state.epoch}", refresh=False)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def after_step(
        self, seen: list[tuple[Batch, Tensor]], weights: Sequence[float], grad_norm: float, role: str
    ) -> None:
        """Count the step; at every `log_every` of them write a row, with the last step of each role since the last.

        Args:
            weights: what the losses of `seen` were multiplied with.
        """
        run = self._run
        loss = torch.stack([loss * weight for (_, loss), weight in zip(seen, weights, strict=True)]).mean().double()
        self._newest[role] = (loss, grad_norm, run.booster.param_groups[0]["lr"])
        self._steps += 1
        for batch, _ in seen:
            tokens, flops = run.throughput.of(batch)
            self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._bar.update()
        self._show_epoch()
        if not is_due(run.state.step, run.schedule.log_every):
            return
        losses = [loss for loss, _, _ in self._newest.values()]
        means = mean_over_ranks(torch.stack([*losses, loss.new_tensor(self._tokens), loss.new_tensor(self._flops)]))
        *losses, tokens, flops = means.tolist()
        now = time.perf_counter()
        seconds = now - self._started
        values: dict[str, float] = {}
        for name, loss_of_role, (_, *others) in zip(self._newest, losses, self._newest.values(), strict=True):
            values |= metrics_of(name, loss_of_role, *others)
        said = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        values |= {
            "epoch": run.state.epoch,
            "samples": run.state.samples,
            "samples_per_second": (run.state.samples - self._samples) / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait": self._waited / seconds,
        }
        sizes = {"dp_size": run.booster.dp_size, "world_size": run.runtime.world_size}
        values |= run.throughput.metrics(tokens, flops, seconds=seconds, **sizes)
        if run.runtime.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for writer in run.writers:
            writer.write(run.state.step, values)
        self._bar.set_postfix_str(
            f"{said} {values['samples_per_second']:.1f} samples/s wait {values['data_wait']:.0%}", refresh=False
        )
        self._newest.clear()
        self._started, self._waited, self._samples, self._steps = now, 0.0, run.state.samples, 0
        self._tokens = self._flops = 0.0

    def off_the_clock(self, look: Callable[..., None]) -> None:
        """Let the watch look at the step that was made, without counting its time as the loop's."""
        began, run = time.perf_counter(), self._run
        look(run.state.step, run.writers, is_last=run.schedule.is_done(run.state))
        self._started += time.perf_counter() - began

    def close(self) -> None:
        self._bar.close()
        for writer in self._run.writers:
            writer.close()
