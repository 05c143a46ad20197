"""What a dataset gives, what a loader collates, and the shape they agree on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opensora_like.datasets.bucket import BucketShape

__all__ = ["Batch", "BucketShape", "Sample"]


@dataclass
class Sample:
    """One row of the table, read and brought to the bucket's shape.

    Args:
        row: index in the table; the counter of every random draw of this sample.
        video_CTHW: float32 in [-1, 1], or None where `latents_CTHW` were cached.
        latents_std_CTHW: of the posterior whose mean `latents_CTHW` is, where it was cached.
        embeddings: cached text embeddings by condition name, each without a batch dimension.
        references: cached latents of frames that were encoded alone, by end and number ("head1"); see
            `conditioning.masks.visual_condition`.
        audio: float32 [samples] in [-1, 1], one channel: the sound of just these frames; see `audio_io`.
    """

    row: int
    text: str
    path: str
    video_CTHW: Tensor | None = None
    latents_CTHW: Tensor | None = None
    latents_std_CTHW: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)
    audio: Tensor | None = None


@dataclass
class Batch:
    """One micro-batch: samples of one shape, in the order of the plan.

    Args:
        index: number of the micro-batch within its epoch's plan.
        rows: the table rows really used (a bad row has been replaced), one per sample.
        bad: (row, path, reason) of the rows that could not be read.
        places: the samples whose pixels `video_BCTHW` has, rising, where ranks deal them; None where it has all.
        audio: of each sample, of any length: rates differ, and so does how long as many frames last. Ranks that deal
            pixels have all of it.
    """

    epoch: int
    index: int
    shape: BucketShape
    rows: list[int]
    text: list[str]
    paths: list[str]
    video_BCTHW: Tensor | None = None
    latents_BCTHW: Tensor | None = None
    latents_std_BCTHW: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    places: list[int] | None = None
    audio: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        alone = (self.video_BCTHW, self.latents_BCTHW, self.latents_std_BCTHW)
        named = (*self.embeddings.values(), *self.references.values(), *(self.audio or ()))
        return [t for t in (*alone, *named) if t is not None]

    def to(self, device: torch.device) -> Batch:
        """On another device; from page-locked memory the copy is only queued."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif name in ("embeddings", "references"):
                moved[name] = {n: t.to(device, non_blocking=True) for n, t in value.items()}
            elif name == "audio" and value is not None:
                moved[name] = [t.to(device, non_blocking=True) for t in value]
        return replace(self, **moved)
