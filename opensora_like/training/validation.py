"""Looks on while a run trains: losses of held-out clips and sampled videos, due by step number.

Nothing here draws from the process' own random numbers, and weights, optimizer and data order are afterwards what they
were, so a run that is looked at is bit for bit the run that is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opensora_like import runtime as rt
from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.manager import TrainState
from opensora_like.conditioning.encode import Encode
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.held_out import SEED, MeasuredLosses, choose_clips, held_out_rows
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.publish import staged
from opensora_like.runtime import MetricWriter, Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.data import build_dataset
from opensora_like.training.ema import EMA
from opensora_like.training.held_out_loss import HeldOut, HeldOutLoss, Step, held_out_settings

FOLDER = "validation"  # below the run's
CLIPS_FILE = "clips.json"  # what was measured; written after the base, so it says that there is one


@dataclass(frozen=True)
class Watched:
    """The run's own parts, as they are while it trains.

    Args:
        forward: the booster's wrapped `model`; ranks of one `dp_rank` call it together, and all ranks equally often.
    """

    cfg: RunConfig
    runtime: Runtime
    folder: Path
    model: Denoiser
    forward: nn.Module
    autoencoder: Autoencoder
    encoders: Mapping[str, TextEncoder]
    booster: Booster
    ema: EMA | None

    @property
    def device(self) -> torch.device:
        return self.runtime.device


class Observer(Protocol):
    """Makes something of what is seen. Training does not know evaluation, so the script brings it."""

    def resume(self, step: int, *, is_new: bool) -> None:
        """Rank 0, before all else: what was seen after `step` belongs to updates that are made again; where `is_new`,
        what was seen before is of other clips."""

    def measured(self, seen: MeasuredLosses) -> Mapping[str, float]:
        """Rank 0. Returns: numbers for the metric writers."""

    def sample(self, step: int, weights: str) -> None:
        """All ranks, without gradients: sample with the weights that are in place."""

    def report(self, step: int) -> None:
        """Rank 0, after all that was due at `step`."""


@contextmanager
def looking_on(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout within, and afterwards generators and modes as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        yield
        for module, mode in modes:
            module.training = mode


@contextmanager
def weights_in_place(booster: Booster, shards: Mapping[str, Tensor]) -> Iterator[None]:
    """The booster's weights are `shards` within, and afterwards its own again, bit for bit; on all ranks together.

    Its own wait in host memory. After an error they stay there: the other ranks would not take part in bringing them
    back, and the run is over.
    """
    own = {name: master.to("cpu", copy=True) for name, master in booster.master_shards()}
    _put(booster, shards)
    yield
    _put(booster, own)


@torch.no_grad()
def _put(booster: Booster, shards: Mapping[str, Tensor]) -> None:
    booster.optimizer_shards()  # `refresh` reads counters back: let them be those of now, not of the last save
    for name, master in booster.master_shards():
        master.copy_(shards[name])
    booster.refresh()


class Watch:
    """Measures and samples when it is due, and hands what it finds to an observer.

    With an EMA, losses are of the raw weights and of the average, and videos of the average.

    Args:
        held_out: measures losses; None where only videos are sampled.
        facts: what the losses depend on but the weights; a base that was measured under others is measured anew.
        every, sample_every: updates between measurements and between samples; 0 is never.
    """

    def __init__(
        self,
        watched: Watched,
        observer: Observer,
        *,
        held_out: HeldOutLoss | None,
        facts: Mapping[str, Any],
        every: int,
        sample_every: int,
    ) -> None:
        self._watched, self._observer, self._ema = watched, observer, watched.ema
        self._held_out, self._facts = held_out, json.loads(json.dumps(facts))
        self._every, self._sample_every = every, sample_every
        self._folder = watched.folder / FOLDER
        self._is_main = watched.runtime.is_main
        self._base, self._is_new = np.empty((0, 0)), False

    def around_load(self, load: Callable[[], TrainState], *, base_is_loaded: bool) -> TrainState:
        """Load, and measure the weights to compare with: those before it, or where `base_is_loaded` those loaded."""
        if base_is_loaded:
            state = load()
            self._measure_base()
            return state
        self._measure_base()
        return load()

    def _measure_base(self) -> None:
        """Of the weights as they are; an earlier start's numbers are kept."""
        if self._held_out is None:
            return
        file, numbers = self._folder / CLIPS_FILE, self._folder / "base.npy"
        if self._all_know(lambda: file.is_file() and json.loads(file.read_text()) == self._facts):
            self._base = np.load(numbers) if self._is_main else self._base
            return
        with looking_on(self._watched.forward):
            self._base, self._is_new = self._held_out.measure(), True
        if self._is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            _save(numbers, self._base)
            with staged(file) as draft:  # half a file would be in the way of every later start
                draft.write_text(json.dumps(self._facts, indent=1))
        logger.info("validation clips %d noise_levels %d loss of the base %.5f", *self._base.shape, self._base.mean())

    def begin(self, step: int, writers: Sequence[MetricWriter], *, is_last: bool) -> None:
        """Before the first update: look at the beginning, or make up for what a kill left out after `step`."""
        measures, samples = self._due(step, is_last=is_last)
        measures = measures and (self._is_new or not self._is_done(step, "losses"))
        samples = samples and (measures or not self._is_done(step, "samples"))
        if self._is_main:
            known = step - 1 if measures else step  # a kill may have come between the rows of one step
            self._observer.resume(known, is_new=self._is_new)
            for file in self._folder.glob("step*"):
                if int(file.name[4:12]) > known or (self._is_new and not file.name.endswith(".samples")):
                    file.unlink()
        self._look(step, writers, measures, samples)

    def after_step(self, step: int, writers: Sequence[MetricWriter], *, is_last: bool) -> None:
        """Do what is due after update `step`; the last one's weights are always looked at. On all ranks."""
        self._look(step, writers, *self._due(step, is_last=is_last))

    def _due(self, step: int, *, is_last: bool) -> tuple[bool, bool]:
        """Whether losses are, and whether samples are."""
        measures = self._held_out is not None and (is_last or step % self._every == 0)
        return measures, self._sample_every > 0 and (is_last or step % self._sample_every == 0)

    def _look(self, step: int, writers: Sequence[MetricWriter], measures: bool, samples: bool) -> None:
        if not measures and not samples:
            return
        found: dict[str, np.ndarray] = {}
        with looking_on(self._watched.forward):
            if measures:
                found["raw" if step else "base"] = self._held_out.measure() if step else self._base
            if samples and (self._ema is None or step == 0):
                self._observer.sample(step, "raw")
            elif self._ema is not None and step > 0:
                with weights_in_place(self._watched.booster, self._ema.shards):
                    if measures:
                        found["ema"] = self._held_out.measure()
                    if samples:
                        self._observer.sample(step, "ema")
        if samples and self._watched.device.type == "cuda":
            torch.cuda.empty_cache()  # or sampling's blocks stay beside those of training
        if self._is_main:
            self._tell(step, found, writers)
            self._mark(step, losses=measures, samples=samples)

    def _tell(self, step: int, found: Mapping[str, np.ndarray], writers: Sequence[MetricWriter]) -> None:
        """Rank 0: keep the numbers and hand them over."""
        numbers: dict[str, float] = {}
        for weights, losses in found.items():
            if weights != "base":
                _save(self._folder / f"{_name(step)}-{weights}.npy", losses)
            about = (self._held_out.buckets, self._held_out.edges)
            numbers |= self._observer.measured(MeasuredLosses(step, weights, losses, self._base, *about))
        for writer in writers if numbers else ():
            writer.write(step, numbers)
        self._observer.report(step)

    def _mark(self, step: int, **done: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for what in (name for name, is_done in done.items() if is_done):
            (self._folder / f"{_name(step)}.{what}").touch()

    def _is_done(self, step: int, what: str) -> bool:
        return self._all_know((self._folder / f"{_name(step)}.{what}").exists)

    def _all_know(self, of_main: Callable[[], bool]) -> bool:
        """What rank 0 finds, on all ranks."""
        return rt.broadcast_text("yes" if self._is_main and of_main() else "") == "yes"


def _name(step: int) -> str:
    return f"step{step:08d}"


def _save(path: Path, table: np.ndarray) -> None:
    with staged(path) as draft, draft.open("wb") as file:
        np.save(file, table)


def build_watch(
    watched: Watched,
    observe: Callable[[Watched], Observer] | None,
    step: Step,
    dataset: ClipDataset,
    *,
    build_encode: Callable[..., Encode],
) -> Watch | None:
    """What looks on, None where nothing is asked for.

    Args:
        observe: makes the observer.
        dataset: that of training.
        build_encode: see training/build.py, which imports this module.

    Raises:
        ValueError: settings that do not fit each other, or without an observer.
    """
    cfg = watched.cfg
    settings = held_out_settings(cfg)
    if cfg.sampling and not cfg.sample_every:
        raise ValueError(f"sampling={dict(cfg.sampling)!r} is used with sample_every only; set it, or remove sampling")
    if cfg.sample_every < 0:
        raise ValueError(f"sample_every={cfg.sample_every} must be a number of updates, or 0")
    if settings is None and not cfg.sample_every:
        return None
    if observe is None:
        raise ValueError("validation and sample_every need an observer; train with scripts/diffusion/train.py")
    held_out, facts = None, {}
    if settings is not None:
        held_out, facts = _build_held_out_loss(watched, settings, step, dataset, build_encode)
    return Watch(
        watched,
        observe(watched),
        held_out=held_out,
        facts=facts,
        every=settings.every if settings else 0,
        sample_every=cfg.sample_every,
    )


def _build_held_out_loss(
    watched: Watched, settings: HeldOut, step: Step, training: ClipDataset, build_encode: Callable[..., Encode]
) -> tuple[HeldOutLoss, dict[str, Any]]:
    """What measures, and what its numbers depend on but the weights."""
    cfg = replace(  # nothing of it depends on the run's seed, and nothing is dropped or drawn
        watched.cfg,
        seed=SEED,
        dataset={**watched.cfg.dataset, **(settings.dataset or {})},
        dropout_ratio={},
        sample_posterior=False,
    )
    dataset = build_dataset(cfg, multiple=training.buckets.multiple)
    rows = held_out_rows(dataset.table, settings.share) if settings.share is not None else None
    held_out = HeldOutLoss(
        step,
        build_encode(cfg, watched.device, watched.model, watched.autoencoder, watched.encoders),
        dataset,
        choose_clips(dataset, rows, settings.num_clips),
        num_bins=settings.num_bins,
        window=(step.scheduler.t_min, step.scheduler.t_max),
        dp_rank=watched.booster.dp_rank,
        dp_size=watched.booster.dp_size,
        device=watched.device,
    )
    names = (
        "model",
        "autoencoder",
        "encoders",
        "scheduler",
        "condition_config",
        "no_i2v_ref_loss",
        "guidance",
        "dtype",
        *(name for name in ("motion_loss_ratio", "error_cut") if getattr(cfg, name)),
    )
    decisive = json.dumps({name: getattr(cfg, name) for name in names}, sort_keys=True, default=str)
    key = hashlib.blake2b(decisive.encode(), digest_size=8).hexdigest()
    return held_out, {
        "table": dataset.table.fingerprint,
        "rows": held_out.rows,
        "edges": held_out.edges,
        "settings": key,
    }
