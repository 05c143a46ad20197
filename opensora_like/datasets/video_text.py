"""Clips and captions: from a row of the table to pixels in the shape of a bucket."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from opensora_like import rng
from opensora_like.datasets.batch import BucketShape, Sample
from opensora_like.datasets.bucket import compile_buckets, sampling_interval
from opensora_like.datasets.plan import EpochPlan, KeptPlans, build_plan
from opensora_like.datasets.quarantine import read_quarantine
from opensora_like.datasets.resize import center_crop, resize_crop
from opensora_like.datasets.shards import ShardedTable, open_shards
from opensora_like.datasets.table import REQUIRED, Table, read_table, table_of
from opensora_like.datasets.video_io import BadSample, find_file, is_image, read_frames, read_image
from opensora_like.publish import staged
from opensora_like.registry import DATASETS, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Transform = Literal["resize_crop", "center"]
TRANSFORMS = {"resize_crop": resize_crop, "center": center_crop}
NO_LIMIT_FPS = 999  # an fps_max from here on means that clips of all rates are mixed, so the rate is not told


def caption_with_suffix(text: str, fps: float | None = None, motion: float | None = None) -> str:
    """The caption with what it says of its speed: "A dog runs. 24 FPS, 4 motion score."

    Training and inference both call this. The published system trains on this form and samples with another
    ("24 FPS. 4 motion score."), so the model meets a text it was not trained on; here the training form is kept, but
    for whole rates below its fps_max, which it writes as "16.0 FPS" in training and as "16 FPS", as here, in sampling.

    Args:
        fps: frames per second at which the clip plays; None or 0 (an image) says nothing.
        motion: how much moves, in the units of the column score_vmafmotion; None says nothing.

    Source: Open-Sora v2, opensora/datasets/datasets.py, VideoTextDataset.
    """
    parts = [f"{fps:g} FPS"] if fps else []
    parts += [f"{int(motion + 0.5)} motion score"] if motion is not None else []
    return f"{text} {', '.join(parts)}.".lstrip() if parts else text


def played_fps(fps: float, fps_max: float | None) -> tuple[float, int]:
    """At which rate a clip plays after frames were left out, and of how many source frames one is taken.

    Args:
        fps: frames per second; NaN for images.
        fps_max: None for no limit.

    Returns: (fps, 1) if it is not above `fps_max`, else (floor(fps / interval), interval); (0, 1) for images.

    Source: Open-Sora v2, opensora/datasets/utils.py, map_target_fps.
    """
    if math.isnan(fps) or fps == 0:
        return 0.0, 1
    interval = int(sampling_interval(fps, fps_max))
    return (fps if interval == 1 else float(fps // interval)), interval


class Clip(NamedTuple):
    """Which frames of a file make a sample, the rate at which they play (0 for one frame), and its caption."""

    path: str
    indices: list[int]
    fps: float
    text: str


@DATASETS.register_module("video_text")
class VideoText:
    """Rows of (path, text), read as videos or images.

    Args:
        data_path: the table: csv, parquet, json or jsonl. See `table.read_table`.
        fps_max: frames are left out of faster clips until they play at this rate or slower; None for no limit.
        transform_name: "resize_crop" (scale to cover the bucket's shape, cut the middle out) or "center" (squares).
        vmaf: tell the column score_vmafmotion in the caption.
        rand_sample_interval: draw the distance of frames from 1 to this instead of following `fps_max`, as far
            as the clip is long enough.
        memory_efficient: parquet only. Of a table that tools/shard.py cut up the shards are read, by row group, and
            the numeric columns are mapped from an index that is made once. Of any other the columns that are used are
            copied once to an Arrow file in the folder for temporary files, and mapped from there. Either way captions
            take no memory until they are read, and all processes of a machine share the pages. Without it the whole
            table is held in memory, which workers share as long as they are forked.
        data_root: folder that the paths in the table start from. Without it they start from the current folder,
            and where there is no such file, from the folder of the table.
        fps_in_caption: tell the rate in the caption.
        quarantine: a csv or jsonl file of rows that never enter a plan, by row and path: what tools/doctor.py writes,
            or a run's bad_samples.jsonl. A run is resumed with the same list.
        bucket_config, multiple, seed: given when the run is built; see `compile_buckets` and `rng`.

    Raises:
        ValueError, FileNotFoundError: as `read_table` and `compile_buckets`; a setting that does not fit.
    """

    def __init__(
        self,
        data_path: str,
        fps_max: float | None = 24.0,
        transform_name: str = "resize_crop",
        vmaf: bool = False,
        rand_sample_interval: int | None = None,
        memory_efficient: bool = False,
        *,
        data_root: str | None = None,
        fps_in_caption: bool = True,
        quarantine: str | None = None,
        bucket_config: Mapping[str, Any],
        multiple: int,
        seed: int,
    ) -> None:
        if transform_name not in get_args(Transform):
            raise ValueError(f"dataset.transform_name={transform_name!r}: {nearest(transform_name, TRANSFORMS)}")
        if rand_sample_interval is not None and rand_sample_interval < 1:
            raise ValueError(f"dataset.rand_sample_interval={rand_sample_interval!r} must be 1 or more, or None")
        self.data_path, self.data_root = data_path, data_root
        self.fps_max, self.vmaf, self.fps_in_caption = fps_max, vmaf, fps_in_caption
        self.transform_name, self.rand_sample_interval = transform_name, rand_sample_interval
        self.seed = seed
        self.table = open_table(data_path, memory_efficient=memory_efficient, with_motion=vmaf)
        if quarantine is not None:
            self.table = self.table.with_quarantine(read_quarantine(quarantine, self.table))
        if vmaf and "score_vmafmotion" not in self.table.column_names:
            raise ValueError(
                f"dataset.vmaf=True needs the column 'score_vmafmotion', table {data_path!r} has only "
                f"{self.table.column_names}; add it or set dataset.vmaf=False"
            )
        self.buckets = compile_buckets(bucket_config, multiple=multiple)
        self._plans = KeptPlans()

    def __len__(self) -> int:
        return self.table.num_rows

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch; see `KeptPlans` for how long it is kept."""
        given = {"fps_max": self.fps_max, "seed": self.seed, "epoch": epoch}
        return self._plans.get(epoch, lambda: build_plan(self.table, self.buckets, **given))

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        """One sample, a function of (seed, epoch, row) and the file alone.

        Raises:
            BadSample: the file cannot be read or does not hold what the table says.
        """
        values = self.table.row(row)
        path = find_file(values["path"], table_path=self.data_path, data_root=self.data_root)
        if is_image(path) and shape.num_frames != 1:
            raise BadSample(path, f"an image; the table has {values['num_frames']} frames for it, run tools/meta.py")
        clip = self.choose_clip(row, shape.num_frames, epoch)
        frames = read_image(path) if is_image(path) else read_frames(path, clip.indices)
        video = TRANSFORMS[self.transform_name](frames, shape.height, shape.width, image=is_image(path))
        return Sample(row=row, text=clip.text, path=path, video_CTHW=video)

    def choose_clip(self, row: int, num_frames: int, epoch: int) -> Clip:
        """What `read` takes of a row, from the table alone."""
        values = self.table.row(row)
        if is_image(values["path"]):
            indices, fps = [0], 0.0
        else:
            indices, fps = self.choose_frames(row, values["num_frames"], values["fps"], num_frames, epoch)
        told_fps = fps if self.fps_in_caption and (self.fps_max or NO_LIMIT_FPS) < NO_LIMIT_FPS else None
        motion = values.get("score_vmafmotion") if self.vmaf else None
        return Clip(values["path"], indices, fps, caption_with_suffix(values["text"], told_fps, motion))

    def choose_frames(self, row: int, total: int, fps: float, num_frames: int, epoch: int) -> tuple[list[int], float]:
        """Which frames of the source make the clip; evenly spaced, every possible beginning equally likely.

        Args:
            total: frames of the source.
            fps: of the source; NaN where it is unknown.
            num_frames: of the clip. A single frame is drawn from the whole source.

        Returns: (indices, frames per second at which they play; 0 for a single frame or an unknown rate)

        Source: Open-Sora v2, opensora/datasets/utils.py, temporal_random_crop, whose spacing varies and which
        never draws the last beginning.
        """
        draws = rng.numpy_generator(self.seed, "frame_offset", epoch, row)
        new_fps, interval = played_fps(fps, self.fps_max)
        if num_frames == 1:
            new_fps, interval = 0.0, 1
        elif self.rand_sample_interval is not None:
            interval = int(draws.integers(1, max(1, min(total // num_frames, self.rand_sample_interval)) + 1))
            new_fps = 0.0 if math.isnan(fps) else (fps if interval == 1 else float(fps // interval))
        last_begin = total - 1 - (num_frames - 1) * interval
        if last_begin < 0:
            raise ValueError(
                f"row {row} of {self.data_path!r} has {total} frames; {num_frames} frames at a distance of {interval} "
                f"need {(num_frames - 1) * interval + 1}"
            )
        begin = int(draws.integers(0, last_begin + 1))
        return [begin + i * interval for i in range(num_frames)], new_fps


def open_table(path: str, *, memory_efficient: bool, with_motion: bool) -> Table | ShardedTable:
    """The table of a dataset: shards if `path` is a folder of them, or has one beside it and memory is to be saved.

    Raises: as `read_table`, `open_shards` and `read_mapped_table`.
    """
    source = Path(path)
    if source.is_dir() or (memory_efficient and source.suffix == ".parquet" and source.with_suffix("").is_dir()):
        return open_shards(source)
    return read_mapped_table(path, with_motion=with_motion) if memory_efficient else read_table(path)


def read_mapped_table(path: str | Path, *, with_motion: bool = False) -> Table:
    """A parquet table of which only numbers are in memory; see `VideoText`, memory_efficient.

    Args:
        with_motion: keep score_vmafmotion, too.

    Raises:
        ValueError: not a parquet file; else as `read_table`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"table {str(path)!r} does not exist; check dataset.data_path")
    if file.suffix.lower() != ".parquet":
        raise ValueError(
            f"dataset.memory_efficient=True reads parquet only, not {str(path)!r}; convert it or set False"
        )
    wanted = [*REQUIRED, *(["score_vmafmotion"] if with_motion else [])]
    try:
        source = parquet.ParquetFile(file, memory_map=True)
    except pa.ArrowException as problem:
        raise ValueError(f"table {str(path)!r} cannot be parsed as parquet: {problem}") from problem
    columns = [name for name in wanted if name in source.schema_arrow.names]
    mapped = _mapped_copy(source, file, columns)
    if "text" not in columns:
        return table_of(mapped, path=str(path))  # which says what is missing
    # the checks would touch every caption, so they see one that stands for all
    one = pa.DictionaryArray.from_arrays(np.zeros(mapped.num_rows, np.int32), ["-"])
    table = table_of(mapped.set_column(columns.index("text"), "text", one), path=str(path))
    other = table.other.set_column(table.other.column_names.index("text"), "text", mapped["text"])
    return replace(table, other=other.set_column(other.column_names.index("path"), "path", mapped["path"]))


def _mapped_copy(source: Any, file: Path, columns: list[str]) -> pa.Table:
    """The columns as an uncompressed Arrow file, written row group by row group and published by a rename."""
    import pyarrow as pa

    status = file.stat()
    key = f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}/{columns}"
    folder = Path(tempfile.gettempdir()) / f"opensora_like-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{file.stem}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.arrow"
    if not target.exists():
        types = {name: pa.large_string() for name in ("path", "text")}
        schema = pa.schema([(n, types.get(n, source.schema_arrow.field(n).type)) for n in columns])
        with staged(target, shared=True) as draft, pa.OSFile(str(draft), "wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in source.iter_batches(batch_size=10_000, columns=columns):
                    writer.write_table(pa.table(batch).select(columns).cast(schema))
    return pa.ipc.open_file(pa.memory_map(str(target))).read_all()
