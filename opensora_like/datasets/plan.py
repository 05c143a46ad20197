"""The order of an epoch: which rows make which micro-batch, as a pure function that every process computes alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.bucket import Buckets, BucketShape
from opensora_like.datasets.drops import EmptyPlan, assign_rows, why_empty
from opensora_like.datasets.index import Mapped, new_array, read_made
from opensora_like.datasets.lazy import Column, Pieces
from opensora_like.datasets.row_index import DrawnRows, RowIndex, build_row_index, draw_rows, in_memory, leave_out
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.shuffle import ShuffledRows, shuffled
from opensora_like.datasets.table import Table
from opensora_like.rng import uniform

MAX_SPARES = 8  # rows that stand by for the bad ones of a micro-batch
ORDER_VERSION = 2  # raised whenever the same settings give another order; 1 sorted all rows of an epoch by their draws
PIECE = 4096  # micro-batches of a sharded table that are computed together


class Position(NamedTuple):
    """Where a run stands: the micro-batch that the next step begins with. It is all a checkpoint keeps of the data."""

    epoch: int
    micro_batch: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank reads for one forward.

    Args:
        index: its number within the epoch's plan.
        rows: int64 [batch size], rows of the table; all different, but in a bucket of fewer rows than a batch.
        spares: int64 [0 to MAX_SPARES], other rows of the bucket; the next ones in its order, in the order in
            which they replace bad rows.
    """

    epoch: int
    index: int
    shape: BucketShape
    rows: np.ndarray
    spares: np.ndarray


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The micro-batches of one epoch, in order; any of them is found without walking over those before.

    Args:
        rows: int64 [rows with a bucket], bucket after bucket, each in the epoch's order, tails included; of a
            `ShardedTable` it gives slices only.
        bounds: int64 [buckets + 1]; bucket b owns rows[bounds[b]:bounds[b + 1]].
        starts: int64 [micro-batches], where in `rows` each begins; of a `ShardedTable` computed where it is read.
        bucket_ids: int32 [micro-batches], likewise.
        fingerprint: of everything that decided the order but the epoch; see `order_key`.
    """

    epoch: int
    buckets: Buckets
    rows: np.ndarray | ShuffledRows
    bounds: np.ndarray
    starts: np.ndarray | Column
    bucket_ids: np.ndarray | Column
    fingerprint: str

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> MicroBatch:
        """Raises: IndexError: no such micro-batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of epoch {self.epoch}, which has {len(self)}")
        bucket, start = int(self.bucket_ids[index]), int(self.starts[index])
        stop = start + int(self.buckets.batch_sizes[bucket])
        first, last = self.bounds[bucket : bucket + 2].tolist()
        shape = self.buckets.shapes[bucket]
        if stop > last:  # the bucket has fewer rows than a batch
            rows = np.resize(self.rows[first:last], stop - start)
            return MicroBatch(self.epoch, index, shape, rows, spares=rows[:0])
        after = self.rows[stop : min(stop + MAX_SPARES, last)]
        wrapped = self.rows[first : min(first + MAX_SPARES - len(after), start)]
        return MicroBatch(
            epoch=self.epoch,
            index=index,
            shape=shape,
            rows=self.rows[start:stop],
            spares=np.concatenate([after, wrapped]),
        )


class KeptPlans:
    """The plans of the two epochs that were asked for last, since the loader reads ahead into the next.

    Pickled it is empty: a loader worker is told what to read, it needs no plan.
    """

    def __init__(self) -> None:
        self._kept: dict[int, EpochPlan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def get(self, epoch: int, build: Callable[[], EpochPlan]) -> EpochPlan:
        """That of an epoch, built if it is not among them."""
        if epoch not in self._kept:
            plan = build()
            self._kept = dict([*self._kept.items()][-1:]) | {epoch: plan}
        return self._kept[epoch]


def build_plan(
    table: Table | ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int, shuffle: bool = True
) -> EpochPlan:
    """Lay out one epoch.

    Each bucket's rows are shuffled, then cut into batches; the rows left over, fewer than one batch per bucket,
    are others each epoch. A bucket with fewer rows than a batch gets one that repeats them, in so many epochs that
    its rows are seen as often as those of other buckets. Then the micro-batches are shuffled. Nothing depends on
    the number of processes. Rows of the table's quarantine are in no bucket; those of the others and their draws stay
    what they are without it.

    Of a `ShardedTable` the rows that are drawn are written once per machine into the folder of its index, those of
    older epochs are deleted there; all else is computed where it is read. The order is that of the same table in
    memory.

    Args:
        fps_max: see `sampling_interval`.
        shuffle: False keeps the table's order within a bucket and goes from bucket to bucket; then the same
            rows are left over each time. Not for a `ShardedTable`.

    Raises:
        EmptyPlan: not one batch is full; the message says what each bucket lacks and why rows have none.
        ValueError: a `ShardedTable` that is not to be shuffled.
    """
    key = order_key(table, buckets, fps_max=fps_max, seed=seed, shuffle=shuffle)["fingerprint"]
    if isinstance(table, ShardedTable):
        if not shuffle:
            raise ValueError(
                f"table {table.path!r} is in shards, which are read in random order only; set shuffle=True"
            )
        return _plan_on_disk(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch, key=key)
    if shuffle:
        index = _row_index(table, buckets, fps_max=fps_max)
        drawn = draw_rows(index, seed=seed, epoch=epoch)
        shuffled_rows = ShuffledRows(index.settled, index.bounds, drawn, seed=seed, epoch=epoch)
        rows, bounds = shuffled_rows[:], shuffled_rows.bounds
    else:
        ids = assign_rows(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
        rows = np.argsort(ids, kind="stable")[np.count_nonzero(ids < 0) :]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(ids[rows], minlength=len(buckets)))])
    order = BatchOrder.cut(bounds, buckets, seed=seed, epoch=epoch, shuffle=shuffle)
    if not len(order):
        ids = assign_rows(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
        raise EmptyPlan(why_empty(table, buckets, ids, fps_max=fps_max, epoch=epoch))
    return EpochPlan(epoch, buckets, rows, bounds, *order.of(0, len(order)), key)


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The micro-batches of an epoch in their order, any run of which is computed without the others.

    They have numbers from bucket to bucket, and the order is one of these numbers.

    Args:
        ends: int64 [buckets], the number after the last of each. batch_sizes: int64 [buckets].
        start_of_0: int64 [buckets], where in the rows of the epoch the bucket's number 0 would begin.
        shuffle: False keeps them in the order of their numbers.
    """

    ends: np.ndarray
    batch_sizes: np.ndarray
    start_of_0: np.ndarray
    seed: int
    epoch: int
    shuffle: bool

    @classmethod
    def cut(cls, bounds: np.ndarray, buckets: Buckets, *, seed: int, epoch: int, shuffle: bool) -> BatchOrder:
        """Cut the rows of every bucket into batches; none at all if no bucket fills one. Args: as `EpochPlan`."""
        counts, sizes = np.diff(bounds), buckets.batch_sizes
        batches = counts // sizes
        if shuffle and batches.any():
            draw = uniform(seed, "plan.small_buckets", epoch, np.arange(len(buckets)))
            batches += (batches == 0) & (draw * sizes < counts)
        ends = np.cumsum(batches)
        return cls(ends, sizes, bounds[:-1] - (ends - batches) * sizes, seed, epoch, shuffle)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns: `starts` and `bucket_ids` of an `EpochPlan` from micro-batch `first` to `last`, not included."""
        numbers = np.arange(first, last)
        if self.shuffle:
            options = {"seed": self.seed, "purpose": "plan.micro_batches", "epoch": self.epoch}
            numbers = shuffled(numbers, len(self), **options)
        buckets = np.searchsorted(self.ends, numbers, side="right")
        return self.start_of_0[buckets] + numbers * self.batch_sizes[buckets], buckets.astype(np.int32)


def _row_index(table: Table | ShardedTable, buckets: Buckets, *, fps_max: float | None) -> RowIndex:
    """Of the table without its quarantine."""
    columns = (table.num_frames, table.height, table.width, table.fps)
    if isinstance(table, ShardedTable):
        index = table.row_index(buckets, fps_max=fps_max)
    else:
        index = build_row_index(columns, buckets, fps_max=fps_max, make=in_memory)
    if table.quarantine is None:
        return index
    return leave_out(index, table.quarantine.rows, columns, fps_max=fps_max)


def _plan_on_disk(
    table: ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int, key: str
) -> EpochPlan:
    index = _row_index(table, buckets, fps_max=fps_max)

    def build(folder: Path) -> None:
        def make(name: str, dtype: type, num: int) -> np.ndarray:
            return new_array(folder / f"{name}.npy", dtype, num)

        drawn = draw_rows(index, seed=seed, epoch=epoch, make=make)
        if not len(BatchOrder.cut(index.bounds + drawn.bounds, buckets, seed=seed, epoch=epoch, shuffle=True)):
            ids = assign_rows(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
            raise EmptyPlan(why_empty(table, buckets, ids, fps_max=fps_max, epoch=epoch))
        np.save(folder / "bounds.npy", drawn.bounds)

    folder = table.index_folder / f"plan-{key[:16]}-{epoch}"
    drawn = read_made(folder, build, lambda f: DrawnRows(Mapped(f / "drawn.npy"), np.load(f / "bounds.npy")))
    table.forget_epochs(f"plan-{key[:16]}-", before=epoch - 1)
    rows = ShuffledRows(index.settled, index.bounds, drawn, seed=seed, epoch=epoch)
    order = BatchOrder.cut(rows.bounds, buckets, seed=seed, epoch=epoch, shuffle=True)
    starts, bucket_ids = map(Pieces(len(order), PIECE, order.of).column, range(2))
    return EpochPlan(epoch, buckets, rows, rows.bounds, starts, bucket_ids, key)


def order_key(
    table: Table | ShardedTable,
    buckets: Buckets,
    *,
    fps_max: float | None,
    seed: int,
    shuffle: bool = True,
    balance: Mapping[str, Any] | None = None,
) -> dict:
    """What decides the data order of every epoch, readable and as one fingerprint; a checkpoint keeps it.

    Args:
        balance: `Balance.key` where micro-batches are balanced.

    Returns: json-able; `table_path` is there for the reader and is not part of the fingerprint.
    """
    decisive = {
        "version": ORDER_VERSION,
        "table": table.fingerprint,
        "num_rows": table.num_rows,
        "bucket_config": buckets.config,
        "multiple": buckets.multiple,
        "fps_max": None if fps_max is None else float(fps_max),
        "seed": int(seed),
        "shuffle": bool(shuffle),
    }
    if balance is not None:
        decisive["balance"] = dict(balance)
    if table.quarantine is not None and len(table.quarantine):
        decisive["quarantine"] = table.quarantine.key
    text = json.dumps(decisive)  # not sorted: of resolutions of one size, the first written is tried first
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {"fingerprint": digest, "table_path": table.path, **decisive}


def what_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare two `order_key`: one phrase per difference, "seed: 42 -> 43"; empty when the order is the same."""
    if saved.get("fingerprint") == now["fingerprint"]:
        return []
    changes = []
    if (old := saved.get("version", 1)) != now["version"]:
        changes.append(f"version of the order: {old} -> {now['version']}, which lays the same epochs out otherwise")
    if saved.get("table") != now["table"]:
        old, new = (f"{k.get('num_rows')} rows of {k.get('table_path')!r}" for k in (saved, now))
        changes.append(f"table: {old} -> {new}" if old != new else f"table: {new} were edited or reordered")
    for name in ("multiple", "fps_max", "seed", "shuffle", "balance"):
        if saved.get(name) != now.get(name):
            changes.append(f"{name}: {saved.get(name)!r} -> {now.get(name)!r}")
    if saved.get("quarantine") != now.get("quarantine"):
        old, new = (_quarantine_text(key.get("quarantine")) for key in (saved, now))
        changes.append(f"dataset.quarantine: {old} -> {new}")
    old, new = (_entries(key.get("bucket_config") or {}) for key in (saved, now))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            changes.append(f"bucket_config.{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    return changes or ["bucket_config: the order of its resolutions"]


def _quarantine_text(key: Mapping[str, Any] | None) -> str:
    return "none" if key is None else f"{key['rows']} rows ({key['digest'][:8]})"


def _entries(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {
        f"{resolution}.{frames}": f"probability {p_hw} (skip {p_skip}), batch size {batch_size}"
        for resolution, table in config.items()
        for frames, (p_hw, p_skip, batch_size) in table.items()
    }


def has_constant_length(plan: EpochPlan) -> bool:
    """Whether every epoch has as many micro-batches as this one: nothing is drawn, no bucket is below one batch."""
    entries = [entry for table in plan.buckets.config.values() for entry in table.values()]
    counts = np.diff(plan.bounds)
    return all(keep >= 1 and skip <= 0 for keep, skip, _ in entries) and not np.any(
        (counts > 0) & (counts < plan.buckets.batch_sizes)
    )


def steps_in_epoch(num_micro_batches: int, micro_per_step: int, start: int = 0) -> int:
    """Whole steps from micro-batch `start` to the end of a plan of `num_micro_batches`."""
    _check_at_least_one(micro_per_step=micro_per_step)
    return max(0, num_micro_batches - start) // micro_per_step


def advance(position: Position, plan_length: int, micro_per_step: int) -> Position:
    """The position after one step; the start of the next epoch when what remains does not fill a step.

    Args:
        plan_length: micro-batches of the plan of ``position.epoch``.
        micro_per_step: dp_size * accumulation.
    """
    following = position.micro_batch + micro_per_step
    if steps_in_epoch(plan_length, micro_per_step, following):
        return Position(position.epoch, following)
    return Position(position.epoch + 1, 0)


def rank_stream(
    plan_of: Callable[[int], EpochPlan], position: Position, *, dp_rank: int, dp_size: int, accumulation: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank from `position` on, epoch after epoch, without end.

    A step takes the next dp_size * accumulation micro-batches of the plan; in round m of the accumulation rank r
    has the one at m * dp_size + r. The tail of an epoch that does not fill a step is not used.

    Args:
        plan_of: epoch -> its plan; called once per epoch.
        dp_rank, dp_size: of the data-parallel group; ranks that share a sequence have one dp_rank.

    Raises:
        ValueError: a rank or position that cannot be (at once), or an epoch too short for one step (when it begins).
    """
    _check_at_least_one(dp_size=dp_size, accumulation=accumulation)
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank!r} is not one of 0 to {dp_size - 1}, which dp_size={dp_size!r} allows")
    if position.epoch < 0 or position.micro_batch < 0:
        raise ValueError(f"position {tuple(position)} has a negative part; a run begins at (0, 0)")
    return _stream(plan_of, position, dp_rank, dp_size, accumulation)


def _stream(
    plan_of: Callable[[int], EpochPlan], position: Position, dp_rank: int, dp_size: int, accumulation: int
) -> Iterator[MicroBatch]:
    micro_per_step = dp_size * accumulation
    while True:
        plan = plan_of(position.epoch)
        check_long_enough(plan, position, dp_size=dp_size, accumulation=accumulation)
        epoch, first = position
        for step in range(steps_in_epoch(len(plan), micro_per_step, first)):
            for m in range(accumulation):
                yield plan[first + step * micro_per_step + m * dp_size + dp_rank]
        position = Position(epoch + 1, 0)


def check_long_enough(plan: EpochPlan, position: Position, *, dp_size: int, accumulation: int) -> None:
    """Raises: ValueError: an epoch too short for one step, or a position behind its end; with the numbers to change."""
    if len(plan) < dp_size * accumulation:
        raise ValueError(
            f"epoch {plan.epoch} has {len(plan)} micro-batches and one step takes {dp_size * accumulation} "
            f"(dp_size {dp_size} * accumulation_steps {accumulation}); lower accumulation_steps, the number of "
            f"processes or the batch sizes in bucket_config, or add clips"
        )
    if position.micro_batch > len(plan):
        raise ValueError(
            f"position {tuple(position)} is behind the end of epoch {plan.epoch}, which has {len(plan)} micro-batches; "
            f"resume with the table and bucket_config of the checkpoint"
        )


def _check_at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value!r} must be 1 or more")
