"""Losses of held-out clips with fixed noise at fixed times: the same table of numbers for any number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like import rng
from opensora_like.conditioning.encode import Inputs
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.held_out import SEED, held_out_rows, table_without
from opensora_like.datasets.loader import read_batch
from opensora_like.datasets.plan import MicroBatch
from opensora_like.registry import fit_arguments
from opensora_like.runtime import logger
from opensora_like.settings import RunConfig
from opensora_like.training.step import draw_noise


@dataclass(frozen=True)
class HeldOut:
    """The section `validation` of a config; give `dataset` or `share`.

    Args:
        every: updates between measurements; the weights of the beginning and of the end are measured in any case.
        dataset: keys of `dataset` that differ for held-out clips, as {"data_path": "held_out.csv"}.
        share: of the rows of the training table, chosen by their paths; training leaves them out.
        num_clips: how many are measured, at most.
        num_bins: equal parts of the range of t; every clip is measured at one t in each.

    Raises:
        ValueError: neither or both of `dataset` and `share`, or a count below 1.
    """

    every: int
    dataset: dict | None = None
    share: float | None = None
    num_clips: int = 64
    num_bins: int = 8

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.share is None):
            raise ValueError(
                f"validation.dataset={self.dataset!r} and validation.share={self.share!r}: give one of them, the keys "
                "of `dataset` that name a held-out table, or the share of the training table to hold out"
            )
        for name in ("every", "num_clips", "num_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name}={getattr(self, name)!r} must be 1 or more")


def held_out_settings(cfg: RunConfig) -> HeldOut | None:
    """The section `validation`, checked; None where there is none."""
    if cfg.validation is None:
        return None
    return HeldOut(**fit_arguments(HeldOut, {"type": "validation", **cfg.validation}, where="validation"))


def hold_out(cfg: RunConfig, dataset: ClipDataset) -> None:
    """Take the rows of ``validation.share`` out of the training dataset's plans; call it before one is made."""
    settings = held_out_settings(cfg)
    if settings is not None and settings.share is not None:
        rows = held_out_rows(dataset.table, settings.share)
        dataset.table = table_without(dataset.table, rows)
        logger.info("validation.share=%s holds out %d of %d rows", settings.share, rows.sum(), dataset.table.num_rows)


class Step(Protocol):
    """What is needed of a training step; see training/step.py."""

    scheduler: Any  # with the range `t_min`, `t_max` of its times

    def errors(self, inputs: Inputs, noise: Tensor, t_B: Tensor) -> Tensor: ...


class HeldOutLoss:
    """Measures the error of every clip at one time in each part of the range of t.

    Noise and time are functions of (clip, part) alone, and so are the clips of a micro-batch, so two measurements
    differ by the weights and by nothing else. The weighting of the training loss is left out: runs that weight or draw
    t otherwise can be compared.

    Args:
        encode: without dropped captions, and with the mean of the posterior.
        batches: the clips; each rank of the booster takes its share of the micro-batches.
        num_bins, window: equal parts, and the range that they are parts of.
        dp_rank, dp_size: of the booster; ranks of one `dp_rank` call the model together.
    """

    def __init__(
        self,
        step: Step,
        encode: Callable[[Batch], Inputs],
        dataset: ClipDataset,
        batches: Sequence[MicroBatch],
        *,
        num_bins: int,
        window: tuple[float, float],
        dp_rank: int,
        dp_size: int,
        device: torch.device,
    ) -> None:
        self._step, self._encode, self._dataset, self._batches = step, encode, dataset, list(batches)
        self._window, self._num_bins, self._device = window, num_bins, device
        # all ranks make equally many forwards, since sharded weights are gathered in each; the last one may be idle
        rounds = -(-len(self._batches) // dp_size)
        self._own = [min(r * dp_size + dp_rank, len(self._batches) - 1) for r in range(rounds)]
        self._encoded: dict[int, Inputs] = {}  # in host memory: what reading and encoding took is paid once
        self._first = np.cumsum([0, *(len(b.rows) for b in self._batches)])
        self._seed = rng.seed_of(SEED, "validation")

    @property
    def num_clips(self) -> int:
        return int(self._first[-1])

    @property
    def rows(self) -> list[int]:
        """Of the held-out table, one per clip."""
        return [int(row) for batch in self._batches for row in batch.rows]

    @property
    def buckets(self) -> list[str]:
        """Of each clip, as a reader of bucket_config calls it with the size: "256px/129 144x256"."""
        names = [(len(b.rows), b.shape) for b in self._batches]
        return [f"{s.resolution}/{s.num_frames} {s.height}x{s.width}" for count, s in names for _ in range(count)]

    @property
    def edges(self) -> list[float]:
        """Of the parts of the range of t."""
        return np.linspace(*self._window, self._num_bins + 1).tolist()

    def measure(self) -> np.ndarray:
        """With the weights as they are; on all ranks together, without gradients.

        Returns: float64 [clips, parts], the same on all ranks.

        Raises:
            ValueError: a clip cannot be read.
        """
        found = {index: self._measure_batch(index) for index in self._own}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {index: errors.cpu().numpy() for index, errors in found.items()})
        table = np.full((self.num_clips, self._num_bins), np.nan)
        for errors in reversed(everyone):  # of ranks that share their samples the first counts
            for index, values in errors.items():
                table[self._first[index] : self._first[index + 1]] = values
        return table

    def _measure_batch(self, index: int) -> Tensor:
        """Returns: [clips of the micro-batch, parts]."""
        rows = self._batches[index].rows
        inputs = _moved(self._inputs(index), self._device)
        low, high = self._window
        columns = []
        for part in range(self._num_bins):
            place = (part + rng.uniform(self._seed, "validation.t", part, rows)) / self._num_bins
            t_B = torch.from_numpy(low + (high - low) * place).float().to(self._device)
            noise = draw_noise(inputs.x0_BCTHW.shape, self._seed, part, rows.tolist(), device=self._device)
            columns.append(self._step.errors(inputs, noise, t_B))
        return torch.stack(columns, dim=1)

    def _inputs(self, index: int) -> Inputs:
        if index not in self._encoded:
            batch = read_batch(self._dataset, self._batches[index])
            self._encoded[index] = _moved(self._encode(batch), torch.device("cpu"))
        return self._encoded[index]


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return Inputs(**{name: _moved_value(value, device) for name, value in fields.items()})


def _moved_value(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved_value(inner, device) for name, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
