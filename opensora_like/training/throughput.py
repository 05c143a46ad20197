"""How much a run computes: tokens, and where the peak of the device is told, operations and their share of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from opensora_like.datasets.batch import Batch
from opensora_like.datasets.cost import Grid
from opensora_like.models.base import TextEncoder
from opensora_like.settings import RunConfig
from opensora_like.training.measure import Work
from opensora_like.training.resources import count_work

TERA = 1e12
BACKWARD = 2  # times the operations of the forward; what checkpointed blocks compute again is no use of the device


class Throughput(NamedTuple):
    """What a batch costs its rank.

    Args:
        forward: operations of the denoiser per sample; None where they are not asked for.
        peak_tflops: of the device.
    """

    grid: Grid
    forward: Work | None
    peak_tflops: float | None

    def of(self, batch: Batch) -> tuple[float, float]:
        """(latent tokens, floating-point operations of forward and backward), 0 of these where not counted."""
        tokens = self.grid.tokens(batch.shape)
        flops = (1 + BACKWARD) * self.forward.at(tokens) if self.forward is not None else 0.0
        return float(len(batch) * tokens), len(batch) * flops

    def metrics(
        self, tokens: float, flops: float, *, seconds: float, dp_size: int, world_size: int
    ) -> dict[str, float]:
        """What is logged of `seconds` in which a rank's batches had so many `tokens` and `flops` on average.

        Ranks of a tensor or sequence group have the same batches and share the work.
        """
        found = {"tokens_per_second": dp_size * tokens / seconds}
        if self.peak_tflops is not None:
            found["tflops"] = flops / seconds / TERA * dp_size / world_size  # of one process
            found["mfu"] = found["tflops"] / self.peak_tflops
        return found


def build_throughput(cfg: RunConfig, encoders: Mapping[str, TextEncoder], grid: Grid) -> Throughput:
    """Of a run; operations are counted on ``meta`` where ``cfg.peak_tflops`` is set.

    Raises:
        ValueError: a peak that is not above 0, or a model whose work cannot be counted.
    """
    if cfg.peak_tflops is None:
        return Throughput(grid, None, None)
    if cfg.peak_tflops <= 0:
        raise ValueError(f"peak_tflops={cfg.peak_tflops} must be above 0: TFLOP/s of the device at {cfg.dtype}")
    work = count_work(cfg.model, encoders, where="peak_tflops", remedy="remove it")
    return Throughput(grid, work.forward, cfg.peak_tflops)
