"""Cached latents and text embeddings as a dataset: of a table of clips, or of whatever a store holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from opensora_like import rng
from opensora_like.datasets.batch import BucketShape, Sample
from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.coverage import rows_of_buckets
from opensora_like.datasets.latent_store import LatentStore, open_store
from opensora_like.datasets.plan import EpochPlan, KeptPlans, build_plan
from opensora_like.datasets.quarantine import read_quarantine
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table, table_of
from opensora_like.datasets.video_io import BadSample
from opensora_like.datasets.video_text import Clip, VideoText
from opensora_like.registry import DATASETS

# options of `VideoText` that decide what was cached; the store knows them
CLIP_OPTIONS = ("fps_max", "transform_name", "vmaf", "rand_sample_interval", "fps_in_caption")


def clip_key(row: int, shape: BucketShape, clip: Clip) -> str:
    """The key of a row's clip in a bucket: equal frames of equal size have one, whatever epoch drew them."""
    step = clip.indices[1] - clip.indices[0] if len(clip.indices) > 1 else 1
    return f"{row:09d}/{shape.num_frames}x{shape.height}x{shape.width}/{clip.indices[0]}+{step}"


@DATASETS.register_module("latents")
class Latents:
    """Samples read from a store that tools/cache_latents.py wrote.

    With `data_path` the plan is that of `video_text` on this table with the options that the store was made with, and
    a sample is the clip that `video_text` would read in this epoch, wherever it was cached. Of a clip that can be cut
    out of its file in several ways the store has those of the first epochs, and later epochs repeat them in turn.

    Without it the rows are the entries of the store, in the order of their keys, with the sizes that were encoded, and
    a bucket of fewer frames takes a window of latent frames out of a longer entry.

    Args:
        cache_path: folder of the store.
        data_path: the table that was cached, of the same rows in the same order.
        memory_efficient: of the table, see `VideoText`.
        quarantine: rows that never enter a plan, see `VideoText`; rows of the store where there is no `data_path`.
        windows: without `data_path`. "random" draws where a window begins; one that does not begin at the first latent
            frame of a causal autoencoder is not quite what encoding these frames would give, as its first latent frame
            stands for several frames and all have seen earlier ones. "first" always begins there, which is exact for
            wan_vae and patch; hunyuan_vae norms over the whole clip, and dc_ae looks ahead. None is "random".
        bucket_config, multiple, seed: given when the run is built; see `compile_buckets` and `rng`.

    Raises:
        FileNotFoundError, ValueError: as `open_store`, `read_table` and `compile_buckets`; a table or buckets that
            were not cached; a setting that would have no effect.
    """

    def __init__(
        self,
        cache_path: str,
        data_path: str | None = None,
        *,
        memory_efficient: bool = False,
        quarantine: str | None = None,
        windows: Literal["random", "first"] | None = None,
        bucket_config: Mapping[str, Any],
        multiple: int,
        seed: int,
    ) -> None:
        self.store: LatentStore = open_store(cache_path)
        self.cache_path, self.seed = cache_path, seed
        self._draws_begin = windows != "first"
        self._clips: VideoText | None = None
        self._plans = KeptPlans()
        if data_path is not None:
            if windows is not None:
                raise ValueError(f"dataset.windows={windows!r} is for a store without dataset.data_path; remove it")
            given = {"bucket_config": bucket_config, "multiple": multiple, "memory_efficient": memory_efficient}
            self._clips = _clips_of(self.store, data_path, quarantine=quarantine, **given)
            self._table, self.buckets, self.fps_max = self._clips.table, self._clips.buckets, self._clips.fps_max
            self._num_epochs = int(pc.max(self.store.table()["epoch"]).as_py()) + 1
        else:
            if memory_efficient:
                raise ValueError("dataset.memory_efficient is about dataset.data_path, and there is none; remove it")
            table = table_of(self.store.table(), path=cache_path)
            if quarantine is not None:
                table = table.with_quarantine(read_quarantine(quarantine, table))
            self._table, self.fps_max = table, None
            self.buckets = compile_buckets(bucket_config, multiple=multiple)
        self._has_text = any(name.startswith("embeddings.") for name in self.store.tensor_names())
        self._check_shapes()

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def table(self) -> Table | ShardedTable:
        """Of `data_path`, or of the store; it may be exchanged for one of the same rows, as held-out clips do."""
        return self._table

    @table.setter
    def table(self, table: Table | ShardedTable) -> None:
        self._table, self._plans = table, KeptPlans()

    def plan(self, epoch: int) -> EpochPlan:
        """As `VideoText.plan`."""
        given = {"fps_max": self.fps_max, "seed": self.seed, "epoch": epoch}
        return self._plans.get(epoch, lambda: build_plan(self.table, self.buckets, **given))

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        """One sample, a function of (seed, epoch, row) and the store alone.

        Raises:
            BadSample: the store does not have it, as its file could not be read.
            ValueError: the caption is not the one that was cached; a shard is gone, truncated or another one.
        """
        if self._clips is not None:
            return self._read_clip(row, shape, epoch)
        values = self.table.row(row)
        frames, whole = self._window(row, values["latent_frames"], shape.num_frames, epoch)
        tensors = self.store.read(values["key"], frames=frames)
        return _sample(row, values["text"], values["path"], tensors, whole=whole)

    def _read_clip(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        for drawn in (epoch, epoch % self._num_epochs):
            clip = self._clips.choose_clip(row, shape.num_frames, drawn)
            key = clip_key(row, shape, clip)
            if key in self.store:
                break
        else:
            raise BadSample(clip.path, f"store {self.cache_path!r} has no {key!r}; its failures.rank*.jsonl tell why")
        if self._has_text and (cached := self.store.facts(key)["text"]) != clip.text:
            raise ValueError(
                f"row {row} of {self.table.path!r} has the caption {clip.text!r}, cached is {cached!r}; cache the "
                "table again into another folder"
            )
        return _sample(row, clip.text, clip.path, self.store.read(key), whole=True)

    def _window(self, row: int, latent_frames: int, wanted: int, epoch: int) -> tuple[slice | None, bool]:
        """The latent frames of an entry that make a bucket's sample, and whether they are all."""
        needed = self._latent_frames(wanted)
        if needed == latent_frames:
            return None, True
        begin = 0
        if self._draws_begin:
            draws = rng.numpy_generator(self.seed, "latent_window", epoch, row)
            begin = int(draws.integers(0, latent_frames - needed + 1))
        return slice(begin, begin + needed), False

    def _latent_frames(self, num_frames: int) -> int:
        facts = self.store.fingerprint["latents"]
        stride = facts["temporal_stride"]
        return (num_frames - 1) // stride + 1 if facts["is_causal"] else max(1, num_frames // stride)

    def _check_shapes(self) -> None:
        """Refuse buckets whose clips the store cannot have."""
        held = self.store.shapes()
        if self._clips is not None and {tuple(shape[1:]) for shape in self.buckets.shapes} <= held:
            return
        for bucket, rows in rows_of_buckets(self.table, self.buckets, fps_max=self.fps_max).items():
            shape, name = self.buckets.shapes[bucket], self.buckets.name(bucket)
            if self._clips is not None:
                if tuple(shape[1:]) not in held:
                    raise ValueError(
                        f"bucket_config: {len(rows)} rows of {self.table.path!r} may come to bucket {name} of "
                        f"{shape.height}x{shape.width}, of which store {self.cache_path!r} has none; run "
                        "tools/cache_latents.py with this config, it adds what is missing"
                    )
                continue
            sizes = np.stack([self.table.height[rows], self.table.width[rows]], 1)
            other = np.flatnonzero((sizes != (shape.height, shape.width)).any(1))
            if len(other):
                row = int(rows[other[0]])
                sizes = ",".join(f"{h}x{w}" for h, w in np.unique(sizes, axis=0).tolist())
                raise ValueError(
                    f"bucket_config: {len(other)} of {len(rows)} entries of store {self.cache_path!r} that come to "
                    f"bucket {name} of {shape.height}x{shape.width} are of another size, the first "
                    f"{self.table.height[row]}x{self.table.width[row]} (row {row}); latents are not resized: name the "
                    f"sizes in bucket_config, those of about equal pixels as one resolution, {sizes!r}"
                )


def _clips_of(store: LatentStore, data_path: str, **arguments: Any) -> VideoText:
    """The dataset whose clips were cached, which is never asked for pixels."""
    made = store.fingerprint.get("dataset")
    if made is None:
        raise ValueError(
            f"dataset.data_path={data_path!r}: store {str(store.folder)!r} was not made from a table; remove it, and "
            "the entries of the store are the rows"
        )
    options = {name: made[name] for name in CLIP_OPTIONS}
    clips = VideoText(data_path, **options, **arguments, seed=made["seed"])
    if clips.table.fingerprint != made["table"]:
        raise ValueError(
            f"dataset.data_path={data_path!r} has other rows ({clips.table.num_rows}, fingerprint "
            f"{clips.table.fingerprint}) than the table in store {str(store.folder)!r} (fingerprint {made['table']}); "
            "give the table that was cached, or cache this one into another folder"
        )
    return clips


def _sample(row: int, text: str, path: str, tensors: Mapping[str, Tensor], *, whole: bool) -> Sample:
    return Sample(
        row=row,
        text=text,
        path=path,
        latents_CTHW=tensors["latents"],
        latents_std_CTHW=tensors.get("latents_std"),
        embeddings=_below("embeddings", tensors),
        references=_below("references", tensors) if whole else {},
    )


def _below(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
