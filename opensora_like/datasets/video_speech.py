"""Clips with captions and what is said in them: pixels, and the stretch of sound that belongs to just these frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from opensora_like.datasets.audio_io import SAMPLE_RATE, read_sound
from opensora_like.datasets.batch import BucketShape, Sample
from opensora_like.datasets.plan import EpochPlan
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table
from opensora_like.datasets.video_io import BadSample, find_file
from opensora_like.datasets.video_text import Clip, VideoText
from opensora_like.registry import DATASETS

COLUMN = "audio_path"


@DATASETS.register_module("video_speech")
class VideoSpeech:
    """Rows of (path, text, audio_path): `VideoText`, and the sound of each clip as `Sample.audio`.

    The sound lasts as long as the frames are shown: n frames that play at f frames per second have n / f seconds of
    it, from when the first of them is shown. A denoiser that deals its vectors to frames evenly, as FantasyTalking
    does, then hears each at its time; with the n - 1 intervals between the frames, as VideoX-Fun trains, the last frame
    would hear what was said one frame before it. A sound that ends less than one frame too early is filled
    up with silence.

    Args:
        data_path, fps_max, transform_name, data_root, fps_in_caption, quarantine: as `VideoText`. The table has one
            more column, `audio_path`: any file with a sound track, the video itself among them. It is looked for
            where the video's path is.
        bucket_config, multiple, seed: given when the run is built; see `compile_buckets` and `rng`.

    Raises:
        ValueError, FileNotFoundError: as `VideoText`; a table without the column, or buckets of single frames.
    """

    def __init__(
        self,
        data_path: str,
        fps_max: float | None = 30.0,
        transform_name: str = "resize_crop",
        *,
        data_root: str | None = None,
        fps_in_caption: bool = False,
        quarantine: str | None = None,
        bucket_config: Mapping[str, Any],
        multiple: int,
        seed: int,
    ) -> None:
        self._clips = VideoText(
            data_path,
            fps_max,
            transform_name,
            data_root=data_root,
            fps_in_caption=fps_in_caption,
            quarantine=quarantine,
            bucket_config=bucket_config,
            multiple=multiple,
            seed=seed,
        )
        self.data_path, self.data_root, self.seed = data_path, data_root, seed
        self.fps_max, self.buckets = fps_max, self._clips.buckets
        if COLUMN not in self.table.column_names:
            raise ValueError(
                f"dataset.type='video_speech' needs the column {COLUMN!r}, table {data_path!r} has only "
                f"{self.table.column_names}; add it (the path of the video, where it has its own sound)"
            )
        if stills := sorted({s.resolution for s in self.buckets.shapes if s.num_frames == 1}):
            raise ValueError(f"bucket_config.{stills[0]}.1: an image says nothing; remove the buckets of 1 frame")

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def table(self) -> Table | ShardedTable:
        """Of `data_path`; it may be exchanged for one of the same rows, as held-out clips do."""
        return self._clips.table

    @table.setter
    def table(self, table: Table | ShardedTable) -> None:
        self._clips.table = table

    def plan(self, epoch: int) -> EpochPlan:
        """As `VideoText.plan`."""
        return self._clips.plan(epoch)

    def choose_clip(self, row: int, num_frames: int, epoch: int) -> Clip:
        """As `VideoText.choose_clip`."""
        return self._clips.choose_clip(row, num_frames, epoch)

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        """One sample, a function of (seed, epoch, row) and the files alone.

        Raises:
            BadSample: video or sound cannot be read, is too short, or is not what the table says.
        """
        values = self.table.row(row)
        if COLUMN not in values:
            raise BadSample(values["path"], f"row {row} of the table has no {COLUMN}")
        if math.isnan(values["fps"]) or values["fps"] <= 0:
            raise BadSample(values["path"], "without a frame rate nothing tells where its sound begins; add fps")
        indices = self.choose_clip(row, shape.num_frames, epoch).indices
        frame_seconds = (indices[1] - indices[0]) / values["fps"]
        sound = read_sound(
            find_file(values[COLUMN], table_path=self.data_path, data_root=self.data_root),
            indices[0] / values["fps"],
            round(len(indices) * frame_seconds * SAMPLE_RATE),
            may_lack_seconds=frame_seconds,
        )
        return replace(self._clips.read(row, shape, epoch), audio=torch.from_numpy(sound))
