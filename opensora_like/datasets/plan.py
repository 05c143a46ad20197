"""The order of an epoch: which rows make which micro-batch, as a pure function that every process computes alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.bucket import CHUNK, Buckets, BucketShape, assign, drop_reasons
from opensora_like.datasets.index import make_folder_once, open_array
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.shuffle import PURPOSE, BinnedRows, bin_rows
from opensora_like.datasets.table import Table
from opensora_like.rng import uniform

MAX_SPARES = 8  # rows that stand by for the bad ones of a micro-batch
MAX_LISTED = 20  # buckets named in an error


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
            `ShardedTable` it is on disk and gives slices only.
        bounds: int64 [buckets + 1]; bucket b owns rows[bounds[b]:bounds[b + 1]].
        starts: int64 [micro-batches], where in `rows` each begins.
        bucket_ids: int32 [micro-batches].
        fingerprint: of everything that decided the order but the epoch; see `order_key`.
        folder: where the arrays are on disk, shared by the processes of a machine; None when they are in memory.
    """

    epoch: int
    buckets: Buckets
    rows: np.ndarray | BinnedRows
    bounds: np.ndarray
    starts: np.ndarray
    bucket_ids: np.ndarray
    fingerprint: str
    folder: Path | None = None

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


def build_plan(
    table: Table | ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int, shuffle: bool = True
) -> EpochPlan:
    """Lay out one epoch.

    Each bucket's rows are shuffled, then cut into batches; the rows left over, fewer than one batch per bucket,
    are others each epoch. A bucket with fewer rows than a batch gets one that repeats them, in so many epochs that
    its rows are seen as often as those of other buckets. Then the micro-batches are shuffled. Nothing depends on
    the number of processes.

    Of a `ShardedTable` the arrays are made once per machine in the folder of its index, those of older epochs
    are deleted there. The order is that of the same table in memory.

    Args:
        fps_max: see `sampling_interval`.
        shuffle: False keeps the table's order within a bucket and goes from bucket to bucket; then the same
            rows are left over each time. Not for a `ShardedTable`.

    Raises:
        ValueError: not one batch is full; the message says what each bucket lacks and why rows have none.
    """
    key = order_key(table, buckets, fps_max=fps_max, seed=seed, shuffle=shuffle)["fingerprint"]
    if isinstance(table, ShardedTable):
        if not shuffle:
            raise ValueError(
                f"table {table.path!r} is in shards, which are read in random order only; set shuffle=True"
            )
        return _plan_on_disk(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch, key=key)
    ids = assign(
        table.num_frames, table.height, table.width, table.fps, buckets, fps_max=fps_max, seed=seed, epoch=epoch
    )
    rows = np.flatnonzero(ids >= 0)
    counts = np.bincount(ids[rows], minlength=len(buckets))
    if shuffle:  # by counter instead of a generator's permutation: the same order under every version of numpy
        rows = rows[np.argsort(uniform(seed, PURPOSE, epoch, rows), kind="stable")]
    rows = rows[np.argsort(ids[rows], kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    cut = _cut_batches(bounds, buckets, seed=seed, epoch=epoch, shuffle=shuffle)
    if cut is None:
        raise ValueError(_why_empty(table, buckets, ids, counts, fps_max=fps_max, epoch=epoch))
    return EpochPlan(epoch, buckets, rows, bounds, *cut, key)


def _cut_batches(
    bounds: np.ndarray, buckets: Buckets, *, seed: int, epoch: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """`starts` and `bucket_ids` of an `EpochPlan`, or None if no bucket fills a batch."""
    counts = np.diff(bounds)
    batches = counts // buckets.batch_sizes
    if not batches.any():
        return None
    if shuffle:
        draw = uniform(seed, "plan.small_buckets", epoch, np.arange(len(buckets)))
        batches += (batches == 0) & (draw * buckets.batch_sizes < counts)
    bucket_ids = np.repeat(np.arange(len(buckets), dtype=np.int32), batches)
    order = _permutation(len(bucket_ids), seed=seed, epoch=epoch) if shuffle else np.arange(len(bucket_ids))
    bucket_ids = bucket_ids[order]
    start_of_0 = bounds[:-1] - (np.cumsum(batches) - batches) * buckets.batch_sizes
    return start_of_0[bucket_ids] + order * buckets.batch_sizes[bucket_ids], bucket_ids


def _permutation(num: int, *, seed: int, epoch: int) -> np.ndarray:
    """0 to num - 1 in the order of their draws; packed with their draws into one number, which sorts faster."""
    bits = num.bit_length()
    scale = 2.0 ** min(53, 64 - bits)
    keys = np.empty(num, np.uint64)
    for start in range(0, num, CHUNK):
        index = np.arange(start, min(start + CHUNK, num), dtype=np.uint64)
        draw = (uniform(seed, "plan.micro_batches", epoch, index) * scale).astype(np.uint64)
        keys[start : start + len(index)] = draw << np.uint64(bits) | index
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.view(np.int64)


def _plan_on_disk(
    table: ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int, key: str
) -> EpochPlan:
    index = table.bucket_index(buckets, fps_max=fps_max)

    def build(folder: Path) -> None:
        bounds = bin_rows(folder, index.codes, index.rows_per_class, index.classes, seed=seed, epoch=epoch)
        cut = _cut_batches(bounds, buckets, seed=seed, epoch=epoch, shuffle=True)
        if cut is None:
            columns = (table.num_frames, table.height, table.width, table.fps)
            ids = assign(*columns, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
            raise ValueError(_why_empty(table, buckets, ids, np.diff(bounds), fps_max=fps_max, epoch=epoch))
        for name, array in zip(("bounds", "starts", "bucket_ids"), (bounds, *cut), strict=True):
            np.save(folder / f"{name}.npy", array)

    folder = make_folder_once(table.index_folder / f"plan-{key[:16]}-{epoch}", build)
    table.forget_epochs(f"plan-{key[:16]}-", before=epoch - 1)
    rows = BinnedRows(folder, seed=seed, epoch=epoch)
    arrays = (open_array(folder / f"{name}.npy") for name in ("bounds", "starts", "bucket_ids"))
    return EpochPlan(epoch, buckets, rows, *arrays, key, folder)


def _why_empty(
    table: Table | ShardedTable,
    buckets: Buckets,
    ids: np.ndarray,
    counts: np.ndarray,
    *,
    fps_max: float | None,
    epoch: int,
) -> str:
    columns = (table.num_frames, table.height, table.width, table.fps)
    dropped = drop_reasons(*columns, buckets, ids, fps_max=fps_max)
    filled = np.flatnonzero(counts)
    filled = filled[np.argsort(-counts[filled], kind="stable")]
    lines = [
        f"the plan of epoch {epoch} has 0 micro-batches: of {table.num_rows} clips in {table.path!r}, {counts.sum()} "
        f"have a bucket and no bucket fills a batch"
    ]
    for b in filled[:MAX_LISTED]:
        clips = f"{counts[b]} {'clip' if counts[b] == 1 else 'clips'}"
        lines.append(
            f"bucket {buckets.name(b)} has {clips} of ratio {buckets.ratios[b]} but its batch size is "
            f"{buckets.batch_sizes[b]}: lower it to {counts[b]}"
        )
    if len(filled) > MAX_LISTED:
        lines.append(f"and {len(filled) - MAX_LISTED} more buckets with fewer clips")
    lines += [f"without a bucket, {reason}: {advice}" for reason, advice in dropped.advice.items()]
    return "\n".join(lines)


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
    text = json.dumps(decisive)  # not sorted: of resolutions of one size, the first written is tried first
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {"fingerprint": digest, "table_path": table.path, **decisive}


def what_changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare two `order_key`: one phrase per difference, "seed: 42 -> 43"; empty when the order is the same."""
    if saved.get("fingerprint") == now["fingerprint"]:
        return []
    changes = []
    if saved.get("table") != now["table"]:
        old, new = (f"{k.get('num_rows')} rows of {k.get('table_path')!r}" for k in (saved, now))
        changes.append(f"table: {old} -> {new}" if old != new else f"table: {new} were edited or reordered")
    for name in ("multiple", "fps_max", "seed", "shuffle", "balance"):
        if saved.get(name) != now.get(name):
            changes.append(f"{name}: {saved.get(name)!r} -> {now.get(name)!r}")
    old, new = (_entries(key.get("bucket_config") or {}) for key in (saved, now))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            changes.append(f"bucket_config.{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    return changes or ["bucket_config: the order of its resolutions"]


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
        _check_long_enough(plan, position, dp_size, accumulation)
        epoch, first = position
        for step in range(steps_in_epoch(len(plan), micro_per_step, first)):
            for m in range(accumulation):
                yield plan[first + step * micro_per_step + m * dp_size + dp_rank]
        position = Position(epoch + 1, 0)


def _check_long_enough(plan: EpochPlan, position: Position, dp_size: int, accumulation: int) -> None:
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
