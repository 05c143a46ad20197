"""A dataset of random clips without files, for tests of the loop: registered by ``custom_imports``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from opensora_like import rng
from opensora_like.datasets.batch import Sample
from opensora_like.datasets.bucket import BucketShape, compile_buckets
from opensora_like.datasets.plan import EpochPlan, build_plan
from opensora_like.datasets.table import table_of
from opensora_like.registry import DATASETS


@DATASETS.register_module("toy_videos")
class ToyVideos:
    """Clips of a colour that depends on the row; `poison` is a row whose pixels are not numbers."""

    fps_max = 24.0

    def __init__(self, num_clips: int = 40, poison: int = -1, *, bucket_config: dict, multiple: int, seed: int) -> None:
        rows = np.arange(num_clips)
        self.table = table_of(
            {
                "path": [f"{i}.mp4" for i in rows],
                "text": [f"clip number {i % 7}" for i in rows],
                "num_frames": np.where(rows % 4 == 0, 1, 9),
                "height": np.full(num_clips, 64),
                "width": np.full(num_clips, 64),
                "fps": np.full(num_clips, 8.0),
            }
        )
        self.buckets = compile_buckets(bucket_config, multiple=multiple)
        self._seed, self._poison = seed, poison
        self._plan = functools.lru_cache(maxsize=2)(self._build)

    def plan(self, epoch: int) -> EpochPlan:
        return self._plan(epoch)

    def _build(self, epoch: int) -> EpochPlan:
        return build_plan(self.table, self.buckets, fps_max=self.fps_max, seed=self._seed, epoch=epoch)

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        facts: dict[str, Any] = self.table.row(row)
        generator = rng.generator(self._seed, "toy", epoch, row)
        video = torch.rand(3, shape.num_frames, shape.height, shape.width, generator=generator) * 2 - 1
        if row == self._poison:
            video[0, 0, 0, 0] = float("nan")
        return Sample(row=row, text=facts["text"], path=facts["path"], video_CTHW=video)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_plan"}
