"""Read the micro-batches of a plan in worker processes, and deal with rows that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.batch import Batch, BucketShape, Sample
from opensora_like.datasets.plan import MicroBatch
from opensora_like.datasets.video_io import BadSample
from opensora_like.runtime import leave_stop_signals_to_parent, stop_signals_held

Found = TypeVar("Found")


def make_loader(
    dataset: ClipDataset,
    micro_batches: Iterable[MicroBatch],
    *,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    shrink: bool = False,
) -> Iterator[Batch]:
    """Read micro-batches ahead, and give them in their order.

    The order comes from `micro_batches` alone, which may be endless: the workers stay over epochs and know
    nothing of a plan. It is drawn from up to ``num_workers * prefetch_factor`` ahead of what was given, so a
    position to resume from is that of the batches used, not that of the iterator.

    Args:
        num_workers: processes, each with one thread; 0 reads in this one. The batches are the same.
        prefetch_factor: micro-batches that each worker reads ahead.
        pin_memory: copy tensors to page-locked memory, for a fast copy to a GPU.
        shrink: where no spare is left, give the rows that can be read, if any, instead of an error.

    Returns: `Batch`es of as many samples as their micro-batch has rows, bad rows replaced by spares and listed
    in `Batch.bad`.

    Raises:
        ValueError: (while iterating) a micro-batch has more bad rows than spares; the files are named.
    """
    options = {"num_workers": num_workers, "prefetch_factor": prefetch_factor, "pin_memory": pin_memory}
    return map(_to_batch, read_ahead(_Reads(dataset, shrink=shrink), micro_batches, **options))


def read_ahead(
    reads: Dataset, indices: Iterable[Any], *, num_workers: int, prefetch_factor: int, pin_memory: bool
) -> Iterator[Any]:
    """``reads[index]`` of each index, in their order, which are being read from now on. Args: as `make_loader`."""
    loader = DataLoader(
        reads,
        sampler=indices,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        # whatever the default: forks share the table's memory, and have no thread yet that takes a signal
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else it draws a seed from the process' own generator
    )
    with stop_signals_held():  # for the readers, until they have begun
        return iter(loader)


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    leave_stop_signals_to_parent()


class NoSpareLeft(ValueError):
    """A micro-batch has more rows that cannot be read than rows that stand by."""


class _Reads(Dataset):
    """Looks a micro-batch up as if it were an index. Gives a dict, since pinning does not know our `Batch`."""

    def __init__(self, dataset: ClipDataset, *, shrink: bool) -> None:
        self.dataset, self.shrink = dataset, shrink

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        try:
            return vars(read_batch(self.dataset, micro_batch, shrink=self.shrink))
        except NoSpareLeft as problem:  # as a value: raised in a worker it would arrive wrapped in its traceback
            return {"error": str(problem)}


def read_batch(dataset: ClipDataset, micro_batch: MicroBatch, *, shrink: bool = False) -> Batch:
    """Read one micro-batch; a bad row's place is taken by the next spare.

    Args:
        shrink: where no spare is left, the place stays empty.

    Raises:
        NoSpareLeft: see there.
    """
    samples, bad = fill_places(
        micro_batch, lambda _, row: dataset.read(row, micro_batch.shape, micro_batch.epoch), shrink=shrink
    )
    return collate(samples, micro_batch=micro_batch, bad=bad)


def fill_places(
    micro_batch: MicroBatch, read: Callable[[int, int], Found], *, shrink: bool = False
) -> tuple[list[Found], list[tuple[int, str, str]]]:
    """One sample for each row, a bad row's place taken by the next spare.

    Args:
        read: place within the micro-batch and row -> sample; raises BadSample.
        shrink: as `read_batch`.

    Returns: samples, and (row, path, reason) of the bad rows.

    Raises:
        NoSpareLeft: see there.
    """
    rows = micro_batch.rows.tolist()
    used = set(rows)
    spares = iter(micro_batch.spares.tolist())
    samples: list[Found] = []
    bad: list[tuple[int, str, str]] = []
    for place, row in enumerate(rows):
        candidate: int | None = row
        while True:
            try:
                samples.append(read(place, candidate))
                break
            except BadSample as problem:
                bad.append((candidate, problem.path, problem.reason))
            candidate = next((spare for spare in spares if spare not in used), None)
            if candidate is None and shrink:
                break
            if candidate is None:
                raise NoSpareLeft(_no_spare_text(micro_batch, bad))
            used.add(candidate)
    return samples, bad


def _no_spare_text(micro_batch: MicroBatch, bad: list[tuple[int, str, str]]) -> str:
    files = "\n".join(f"  row {row} {path!r}: {reason}" for row, path, reason in bad)
    return (
        f"micro-batch {micro_batch.index} of epoch {micro_batch.epoch} ({micro_batch.shape}): {len(bad)} of its "
        f"{len(micro_batch.rows)} rows and {len(micro_batch.spares)} spares cannot be read, and no spare is left; "
        f"remove them from the table (tools/meta.py does):\n{files}"
    )


def collate(samples: list[Sample], *, micro_batch: MicroBatch, bad: list[tuple[int, str, str]]) -> Batch:
    """Stack samples of one shape.

    Raises:
        ValueError: tensors of different shapes; both are named.
    """
    return replace(
        without_tensors(samples, micro_batch=micro_batch, bad=bad),
        video_BCTHW=_stack("video", samples, [s.video_CTHW for s in samples]),
        latents_BCTHW=_stack("latents", samples, [s.latents_CTHW for s in samples]),
        latents_std_BCTHW=_stack("latents_std", samples, [s.latents_std_CTHW for s in samples]),
        embeddings=_stack_named("embeddings", samples, [s.embeddings for s in samples]),
        references=_stack_named("references", samples, [s.references for s in samples]),
        audio=sounds_of(samples),
    )


class Sounding(Protocol):
    """What may have a sound."""

    path: str
    audio: torch.Tensor | None


def sounds_of(samples: Sequence[Sounding]) -> list[torch.Tensor] | None:
    """The sound of each sample, None where none has one.

    Raises:
        ValueError: some have one and some have none.
    """
    mute = [sample.path for sample in samples if sample.audio is None]
    if mute and len(mute) < len(samples):
        raise ValueError(f"{mute[0]!r} has no sound, and others in the same batch have; a dataset gives it to all")
    return None if mute else [sample.audio for sample in samples]


class Named(Protocol):
    """What is known of a sample beside its tensors."""

    row: int
    text: str
    path: str


def without_tensors(samples: Sequence[Named], *, micro_batch: MicroBatch, bad: list[tuple[int, str, str]]) -> Batch:
    """A batch of these samples that has no tensors yet."""
    return Batch(
        epoch=micro_batch.epoch,
        index=micro_batch.index,
        shape=micro_batch.shape,
        rows=[sample.row for sample in samples],
        text=[sample.text for sample in samples],
        paths=[sample.path for sample in samples],
        bad=bad,
    )


def _stack_named(kind: str, samples: list[Sample], named: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = sorted({name for tensors in named for name in tensors})
    return {name: _stack(f"{kind}.{name}", samples, [tensors.get(name) for tensors in named]) for name in names}


def _stack(name: str, samples: list[Sample], tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    if all(tensor is None for tensor in tensors):
        return None
    first = tensors[0]
    for sample, tensor in zip(samples, tensors, strict=True):
        if tensor is None or first is None or tensor.shape != first.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (first, tensor)]
            raise ValueError(
                f"{name} of {sample.path!r} is {shapes[1]}, that of {samples[0].path!r} in the same batch is "
                f"{shapes[0]}; all samples of a bucket need one shape"
            )
    return torch.stack(tensors)


def _to_batch(fields: dict[str, Any]) -> Batch:
    if "error" in fields:
        raise NoSpareLeft(fields["error"])
    shape, bad = BucketShape(*fields["shape"]), [tuple(entry) for entry in fields["bad"]]  # pinning makes lists of both
    return Batch(**{**fields, "shape": shape, "bad": bad})


class BadSampleLog:
    """Writes down what could not be read, and stops a run that loses too much of its data.

    Args:
        path: of the file, one line of json per bad row: row, path, reason, epoch. It is appended to.
        max_bad_fraction: the share of the samples seen that may be bad, from 0 to 1.
        min_seen: before this many samples nothing is judged.
    """

    def __init__(self, path: str | Path, *, max_bad_fraction: float = 0.01, min_seen: int = 20) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction!r} is not between 0 and 1")
        self.path, self.max_bad_fraction, self.min_seen = Path(path), max_bad_fraction, min_seen
        self.num_seen = 0
        self.num_bad = 0

    def record(self, batch: Batch) -> None:
        """Count a batch and write down its bad rows.

        Raises:
            ValueError: more than `max_bad_fraction` of the samples seen could not be read.
        """
        self.num_seen += len(batch) + len(batch.bad)
        self.num_bad += len(batch.bad)
        if batch.bad:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"row": row, "path": p, "reason": reason, "epoch": batch.epoch} for row, p, reason in batch.bad]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if self.num_seen >= self.min_seen and self.num_bad > self.max_bad_fraction * self.num_seen:
            raise ValueError(
                f"{self.num_bad} of {self.num_seen} samples cannot be read, max_bad_fraction={self.max_bad_fraction} "
                f"allows {int(self.max_bad_fraction * self.num_seen)}; they are listed in {str(self.path)!r}: correct "
                f"the table (tools/meta.py leaves them out) or raise max_bad_fraction"
            )
