"""What a dataset gives, what a loader collates, and the shape they agree on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from opensora_like.datasets.bucket import BucketShape

__all__ = ["Batch", "BucketShape", "Sample"]


@dataclass
class Sample:
    """One row of the table, read and brought to the bucket's shape.

    Args:
        row: index in the table; the counter of every random draw of this sample.
        video_CTHW: float32 in [-1, 1], or None where `latents_CTHW` were cached.
        embeddings: cached text embeddings by condition name, each without a batch dimension.
    """

    row: int
    text: str
    path: str
    video_CTHW: Tensor | None = None
    latents_CTHW: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """One micro-batch: samples of one shape, in the order of the plan.

    Args:
        index: number of the micro-batch within its epoch's plan.
        rows: the table rows really used (a bad row has been replaced), one per sample.
        bad: (row, path, reason) of the rows that could not be read.
    """

    epoch: int
    index: int
    shape: BucketShape
    rows: list[int]
    text: list[str]
    paths: list[str]
    video_BCTHW: Tensor | None = None
    latents_BCTHW: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    bad: list[tuple[int, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)
