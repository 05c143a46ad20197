"""Predicts memory, time and cost of training steps from what `measure` counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from opensora_like.datasets.bucket import MAX_COUNT, Buckets, BucketShape
from opensora_like.datasets.cost import CostModel, Grid
from opensora_like.datasets.plan import EpochPlan
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.rng import uniform
from opensora_like.training.measure import (
    EncodeUse,
    ModelMemory,
    ModelWork,
    build_on_meta,
    measure_autoencoder,
    measure_work,
)

DEFAULT_TEXT = 512  # tokens of a caption, where no encoder tells


class Gpu(NamedTuple):
    """Args: gib: memory that a process can have. tflops: dense bfloat16, as the vendor states it."""

    gib: float
    tflops: float


GPUS = {
    "b200": Gpu(178.0, 2250.0),
    "h200": Gpu(139.0, 989.0),
    "h100": Gpu(79.0, 989.0),
    "a100-80g": Gpu(79.0, 312.0),
    "a100-40g": Gpu(39.5, 312.0),
    "l40s": Gpu(44.5, 362.0),
    "rtx4090": Gpu(23.5, 165.0),
}


def cost_model(work: ModelWork, *, encode_flops_per_pixel: float = 0.0, text_flops: float = 0.0) -> CostModel:
    """A cost model in TFLOP, rounded to four digits, so that it does not change with a version of torch.

    Args:
        text_flops: of the text encoders, for one caption.
    """

    def rounded(flops: float) -> float:
        return float(f"{max(flops, 0.0) / 1e12:.3e}")

    return CostModel(
        per_token=rounded(work.step.per_token),
        per_token_pair=rounded(work.step.per_pair),
        per_sample=rounded(work.step.fixed + text_flops),
        per_pixel=rounded(encode_flops_per_pixel),
    )


def count_work(model: Mapping[str, Any], encoders: Mapping[str, TextEncoder], *, where: str, remedy: str) -> ModelWork:
    """Operations of a denoiser under the text of its encoders, counted without running it.

    Args:
        model: the section of the config.
        where, remedy: the setting that asks, and what else can be done; for the error.

    Raises:
        ValueError: the model takes a condition of unknown shape.
    """
    text_length = max((getattr(encoder, "max_length", 0) for encoder in encoders.values()), default=0) or DEFAULT_TEXT
    try:
        return measure_work(build_on_meta(model, where="model"), text_length=text_length)
    except ValueError as problem:
        raise ValueError(f"{where}: the work of the model cannot be counted: {problem}; or {remedy}") from problem


def derive_cost(
    model: Mapping[str, Any],
    autoencoder: Mapping[str, Any] | None,
    encoders: Mapping[str, TextEncoder],
    buckets: Buckets,
) -> CostModel:
    """The cost model of a run from the operations of its parts, counted without running them.

    Args:
        model, autoencoder: sections of the config; None where latents are cached. encoders: built.

    Raises:
        ValueError: the model takes a condition of unknown shape.
    """
    work = count_work(model, encoders, where="cost", remedy="set cost, {per_token: 1.0}")
    flops_per_pixel = 0.0
    if autoencoder is not None:
        smallest = min(buckets.shapes, key=lambda s: (s.num_frames == 1, s.num_frames * s.height * s.width))
        encode = measure_autoencoder(build_on_meta(autoencoder, where="autoencoder"), smallest, smallest)
        flops_per_pixel = encode.flops_per_pixel
    text_flops = sum(
        2 * sum(p.numel() for p in encoder.parameters()) * getattr(encoder, "max_length", DEFAULT_TEXT)
        for encoder in encoders.values()
    )
    return cost_model(work, encode_flops_per_pixel=flops_per_pixel, text_flops=text_flops)


def grid_of(model: Denoiser, autoencoder: Autoencoder) -> Grid:
    """How clips become tokens of this model."""
    return Grid(autoencoder.temporal_stride, autoencoder.spatial_stride * model.patch_size)


class Static(NamedTuple):
    """Bytes per rank that do not depend on the micro-batch."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


# booster -> (bytes of working weights, of gradients, of masters and Adam, and which of the three are cut over ranks)
LAYOUTS: dict[str, tuple[float, float, float, str]] = {
    "ddp": (4 + 2, 4, 8, ""),  # autocast keeps a bfloat16 copy of the weights it used
    "zero0": (2, 2, 12, ""),
    "zero1": (2, 2, 12, "optimizer"),
    "zero2": (2, 2, 12, "optimizer gradients"),
    "zero3": (2, 2, 12, "optimizer gradients weights"),
    "fsdp2": (2, 4, 12, "optimizer gradients weights"),
}


def static_memory(
    model: nn.Module,
    *,
    layout: str,
    shards: int,
    tp_size: int = 1,
    ema: bool = False,
    bucket_elements: int = 20 * 2**20,
    moments: Callable[[float], float] = lambda n: n,
) -> Static:
    """Weights, gradients, masters and Adam, and the EMA of one rank, in mixed precision.

    Args:
        layout: a key of `LAYOUTS`.
        shards: ranks over which ZeRO or FSDP cuts (data and sequence parallel ones).
        bucket_elements: of a reduction bucket; two of them are in flight.
        moments: bytes of masters and optimizer -> those really kept (SGD without momentum keeps no moments).

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no memory model of booster layout {layout!r}; there is one of {sorted(LAYOUTS)}")
    weights, gradients, optimizer, cut = LAYOUTS[layout]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / tp_size
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) / tp_size

    def share(name: str) -> float:
        return 1 / shards if name in cut.split() else 1.0

    return Static(
        weights=(weights * trainable + 2 * frozen) * share("weights"),
        gradients=gradients * trainable * share("gradients"),
        optimizer=moments(optimizer) * trainable * share("optimizer"),
        ema=4 * trainable / shards if ema else 0.0,
        buffers=4.0 * min(bucket_elements, trainable) if layout not in ("ddp",) else 0.0,
    )


class BucketUse(NamedTuple):
    """What one micro-batch of a bucket takes on a rank.

    Args:
        tokens: latent tokens of a sample. tflop: of the rank. gib: everything it has to hold, see `predict`.
    """

    bucket: int
    shape: BucketShape
    batch_size: int
    tokens: int
    tflop: float
    gib: float
    seconds: float


@dataclass(frozen=True)
class Rank:
    """A rank, and how a sample is cut over several.

    Args:
        mfu: share of the GPU's dense bfloat16 peak that the operations reach, recomputed ones counted.
        held: bytes that do not depend on the micro-batch: `Static.total` and frozen models.
        split: ranks that share a sample (sequence and tensor parallelism).
    """

    gpu: Gpu
    mfu: float
    held: float
    split: int = 1


@dataclass(frozen=True)
class Prediction:
    """Curves of a config, to be read at any bucket and batch size.

    Args:
        cost: in TFLOP. encode_batch: samples that the autoencoder codes at once, None for all.
    """

    grid: Grid
    cost: CostModel
    memory: ModelMemory
    encode: EncodeUse
    encode_batch: int | None
    rank: Rank

    def of(self, bucket: int, shape: BucketShape, batch_size: int) -> BucketUse:
        """One micro-batch."""
        tokens = self.grid.tokens(shape)
        tflop = float(self.cost.of([shape], [batch_size], self.grid)[0]) / self.rank.split
        pixels = shape.num_frames * shape.height * shape.width
        coded = min(batch_size, self.encode_batch or batch_size)
        encode = coded * max(0.0, self.encode.fixed_bytes + self.encode.bytes_per_pixel * pixels)
        train = batch_size * self.memory.peak.at(tokens) / self.rank.split  # text tokens are cut along
        gib = (self.rank.held + max(encode, train)) / 2**30
        return BucketUse(bucket, shape, batch_size, tokens, tflop, gib, tflop / (self.rank.gpu.tflops * self.rank.mfu))

    def of_rungs(self, buckets: Buckets) -> list[BucketUse]:
        """For every resolution and number of frames, the aspect ratio with the most tokens."""
        heaviest: dict[str, BucketUse] = {}
        for bucket, shape in enumerate(buckets.shapes):
            use = self.of(bucket, shape, int(buckets.batch_sizes[bucket]))
            name = buckets.name(bucket)
            if name not in heaviest or use.tokens > heaviest[name].tokens:
                heaviest[name] = use
        return list(heaviest.values())

    def fill(self, buckets: Buckets, *, limit_gib: float) -> list[BucketUse]:
        """Batch sizes for equal time: the slowest bucket that is full at the limit sets the time, others fit into it.

        Raises:
            ValueError: a bucket does not fit with one sample.
        """
        full = []
        for use in self.of_rungs(buckets):
            if self.of(use.bucket, use.shape, 1).gib > limit_gib:
                raise ValueError(
                    f"bucket {buckets.name(use.bucket)} needs {self.of(use.bucket, use.shape, 1).gib:.1f} GiB for one "
                    f"sample, the limit is {limit_gib:.1f}; checkpoint more blocks, or cut the sample over more ranks"
                )
            full.append(self._largest(use, lambda made: made.gib <= limit_gib))
        seconds = max(min(use.seconds for use in full), max(self.of(u.bucket, u.shape, 1).seconds for u in full))
        return [
            self._largest(use, lambda made: made.gib <= limit_gib and made.seconds <= 1.0001 * seconds) for use in full
        ]

    def _largest(self, use: BucketUse, fits: Callable[[BucketUse], bool]) -> BucketUse:
        low, high = 1, MAX_COUNT
        while low < high:  # what fits with one sample more fits with fewer
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(self.of(use.bucket, use.shape, middle)) else (low, middle - 1)
        return self.of(use.bucket, use.shape, low)


def uniform_plan(buckets: Buckets, num_micro_batches: int, *, seed: int = 0) -> EpochPlan:
    """A plan in random order, for configs without a table: every number of frames has equally many clips, all 16:9.

    It has no rows; `utilisation` and costs are all that can be asked of it.
    """
    wide = np.array([ratio == "16:9" for ratio in buckets.ratios])
    if not wide.any():
        wide = np.ones(len(buckets), bool)
    share = np.cumsum(np.where(wide, 1 / buckets.batch_sizes, 0.0))
    draw = uniform(seed, "uniform_plan", 0, np.arange(num_micro_batches))
    ids = np.searchsorted(share / share[-1], draw, side="right").astype(np.int32)
    return EpochPlan(0, buckets, np.arange(0), np.zeros(len(buckets) + 1, int), np.arange(len(ids)), ids, "uniform")


def layout_of(booster: Mapping[str, Any]) -> str:
    """The key of `LAYOUTS` for the booster section of a config.

    Raises:
        ValueError: none is known for it.
    """
    kind, config = booster["type"], booster.get("plugin_config") or {}
    plugin = booster.get("plugin", "zero2")
    found = {"ddp": "ddp", "fsdp2": "fsdp2", "deepspeed": f"zero{booster.get('stage', 2)}", "colossalai": plugin}.get(
        kind
    )
    if plugin == "hybrid" and kind == "colossalai":
        found = f"zero{config.get('zero_stage', 2)}"
    if found not in LAYOUTS:
        raise ValueError(f"booster={dict(booster)!r}: its memory is not known; give one of --layout {sorted(LAYOUTS)}")
    return found
