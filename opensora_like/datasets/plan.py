"""The order of an epoch: which rows make which micro-batch, as a pure function that every process computes alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.bucket import Buckets, BucketShape, assign, drop_reasons
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
        rows: int64 [batch size], rows of the table.
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
        rows: int64 [rows with a bucket], bucket after bucket, each in the epoch's order, tails included.
        bounds: int64 [buckets + 1]; bucket b owns rows[bounds[b]:bounds[b + 1]].
        starts: int64 [micro-batches], where in `rows` each begins.
        bucket_ids: int32 [micro-batches].
        fingerprint: of everything that decided the order but the epoch; see `order_key`.
    """

    epoch: int
    buckets: Buckets
    rows: np.ndarray
    bounds: np.ndarray
    starts: np.ndarray
    bucket_ids: np.ndarray
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
        after = self.rows[stop : min(stop + MAX_SPARES, last)]
        wrapped = self.rows[first : min(first + MAX_SPARES - len(after), start)]
        return MicroBatch(
            epoch=self.epoch,
            index=index,
            shape=self.buckets.shapes[bucket],
            rows=self.rows[start:stop],
            spares=np.concatenate([after, wrapped]),
        )


def build_plan(
    table: Table, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int, shuffle: bool = True
) -> EpochPlan:
    """Lay out one epoch.

    Each bucket's rows are shuffled, then cut into batches; the rows left over, fewer than one batch per bucket,
    are others each epoch. Then the micro-batches are shuffled. Nothing depends on the number of processes.

    Args:
        fps_max: see `sampling_interval`.
        shuffle: False keeps the table's order within a bucket and goes from bucket to bucket; then the same
            rows are left over each time.

    Raises:
        ValueError: not one batch is full; the message says what each bucket lacks and why rows have none.
    """
    ids = assign(
        table.num_frames, table.height, table.width, table.fps, buckets, fps_max=fps_max, seed=seed, epoch=epoch
    )
    rows = np.flatnonzero(ids >= 0)
    counts = np.bincount(ids[rows], minlength=len(buckets))
    if shuffle:  # by counter instead of a generator's permutation: the same order under every version of numpy
        rows = rows[np.argsort(uniform(seed, "plan.rows", epoch, rows), kind="stable")]
    rows = rows[np.argsort(ids[rows], kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    batches = counts // buckets.batch_sizes
    if not batches.any():
        raise ValueError(_why_empty(table, buckets, ids, counts, fps_max=fps_max, epoch=epoch))
    bucket_ids = np.repeat(np.arange(len(buckets), dtype=np.int32), batches)
    within = np.arange(len(bucket_ids)) - np.repeat(np.cumsum(batches) - batches, batches)
    starts = bounds[bucket_ids] + within * buckets.batch_sizes[bucket_ids]
    if shuffle:
        order = np.argsort(uniform(seed, "plan.micro_batches", epoch, np.arange(len(starts))), kind="stable")
        starts, bucket_ids = starts[order], bucket_ids[order]
    key = order_key(table, buckets, fps_max=fps_max, seed=seed, shuffle=shuffle)
    return EpochPlan(epoch, buckets, rows, bounds, starts, bucket_ids, key["fingerprint"])


def _why_empty(
    table: Table, buckets: Buckets, ids: np.ndarray, counts: np.ndarray, *, fps_max: float | None, epoch: int
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


def order_key(table: Table, buckets: Buckets, *, fps_max: float | None, seed: int, shuffle: bool = True) -> dict:
    """What decides the data order of every epoch, readable and as one fingerprint; a checkpoint keeps it.

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
    for name in ("multiple", "fps_max", "seed", "shuffle"):
        if saved.get(name) != now[name]:
            changes.append(f"{name}: {saved.get(name)!r} -> {now[name]!r}")
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
