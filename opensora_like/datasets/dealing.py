"""Ranks that are given the same micro-batches each read a part of the samples, and know of the others what was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.loader import fill_places, read_ahead, sounds_of, without_tensors
from opensora_like.datasets.plan import MicroBatch
from opensora_like.datasets.video_io import BadSample


class Dealing(Protocol):
    """Who reads what; see conditioning/sharing.py.

    Args:
        rank: of this process among those that share.
    """

    rank: int

    def places(self, num_samples: int, index: int) -> list[int]:
        """Which samples of micro-batch `index` this rank reads."""

    def owner(self, place: int, index: int) -> int:
        """Who reads the sample at `place`."""

    def everyone(self, value: Any) -> list[Any]:
        """A small object of each rank; all call it together."""


def make_dealt_loader(
    dataset: ClipDataset,
    micro_batches: Iterable[MicroBatch],
    dealing: Dealing,
    *,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """As `loader.make_loader`, but a batch has the pixels of this rank's samples only; see `Batch.places`.

    Rows, captions, paths and what was bad are those of `make_loader`, the same on all ranks that share. Of a batch
    with a bad row, the rank that the place belongs to reads the spare in this process, when the batch is asked for.

    Args:
        dealing: all of its ranks take their batches in step, as each batch is agreed upon.

    Raises:
        ValueError: (while iterating) as `make_loader`, or a dataset that gives something else than pixels.
    """
    dealt = ((batch, dealing.places(len(batch.rows), batch.index)) for batch in micro_batches)
    options = {"num_workers": num_workers, "prefetch_factor": prefetch_factor, "pin_memory": pin_memory}
    return map(partial(_agreed, dataset=dataset, dealing=dealing), read_ahead(_Reads(dataset), dealt, **options))


@dataclass(frozen=True)
class _Told:
    """What the other ranks hear of a sample: all but its pixels, its sound as well, of which there is little.

    Args:
        reason: why it could not be read; None if it was.
    """

    row: int
    text: str
    path: str
    reason: str | None = None
    audio: Tensor | None = None


class _Reads(Dataset):
    """Looks up a micro-batch and the places to read as if they were an index."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, dealt: tuple[MicroBatch, list[int]]) -> dict[str, Any]:
        micro_batch, places = dealt
        found = {place: _read(self.dataset, micro_batch, int(micro_batch.rows[place])) for place in places}
        videos = [video for _, video in found.values() if video is not None]
        return {
            "micro_batch": micro_batch,
            "told": {place: told for place, (told, _) in found.items()},
            "video": torch.stack(videos) if videos else None,
        }


def _read(dataset: ClipDataset, micro_batch: MicroBatch, row: int) -> tuple[_Told, Tensor | None]:
    shape = micro_batch.shape
    try:
        sample = dataset.read(row, shape, micro_batch.epoch)
    except BadSample as problem:
        return _Told(row, "", problem.path, problem.reason), None
    video, wanted = sample.video_CTHW, (3, shape.num_frames, shape.height, shape.width)
    if video is None or tuple(video.shape) != wanted or sample.embeddings or sample.references:
        found = None if video is None else tuple(video.shape)
        raise ValueError(
            f"{sample.path!r} has pixels {found}, embeddings of {sorted(sample.embeddings)} and references "
            f"{sorted(sample.references)}; ranks that deal the samples of a bucket exchange pixels of {wanted} only"
        )
    return _Told(sample.row, sample.text, sample.path, audio=sample.audio), video


def _agreed(read: dict[str, Any], *, dataset: ClipDataset, dealing: Dealing) -> Batch:
    """The batch, the same on all ranks but for its pixels; all call it together."""
    micro_batch: MicroBatch = read["micro_batch"]
    told = {place: one for part in dealing.everyone(read["told"]) for place, one in part.items()}
    good = [place for place, one in read["told"].items() if one.reason is None]
    videos = dict(zip(good, [] if read["video"] is None else read["video"], strict=True))
    rows = micro_batch.rows.tolist()

    def look_up(place: int, row: int) -> _Told:
        found = told[place]
        if row != rows[place]:  # a spare
            owner, mine = dealing.owner(place, micro_batch.index), None
            if owner == dealing.rank:
                mine, video = _read(dataset, micro_batch, row)
                if video is not None:
                    videos[place] = video
            found = dealing.everyone(mine)[owner]
        if found.reason is not None:
            raise BadSample(found.path, found.reason)
        return found

    samples, bad = fill_places(micro_batch, look_up)
    places = sorted(videos)
    as_read = places == good  # the usual case: the pixels stay where they are, in page-locked memory
    return replace(
        without_tensors(samples, micro_batch=micro_batch, bad=bad),
        video_BCTHW=read["video"] if as_read else torch.stack([videos[place] for place in places]),
        places=places,
        audio=sounds_of(samples),
    )
