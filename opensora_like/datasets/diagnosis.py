"""What becomes of every row of a table in an epoch, and what is wrong with rows, before training finds out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opensora_like import rng
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.bucket import Buckets, sampling_interval
from opensora_like.datasets.drops import REASONS, EmptyPlan, assign_rows, reasons_of_table
from opensora_like.datasets.plan import EpochPlan
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table
from opensora_like.datasets.video_io import BadSample, find_file

# what becomes of a row in an epoch; `Diagnosis.outcomes` index this
OUTCOMES = (*REASONS, "batch_remainder", "held_out")
REMAINDER, HELD_OUT = len(REASONS), len(REASONS) + 1
# what can be wrong with a row, in the order of the tables; the first ones make it unfit for training
DEFECTS = (
    "missing_file",
    "undecodable",
    "absurd_fps",
    "absurd_size",
    "empty_caption",
    "unknown_fps",
    "duplicate_caption",
)
HARMFUL = DEFECTS[:5]
LEAST_FPS, MOST_FPS = 1.0, 240.0  # of a video; slower and faster ones are slips of a container more often than clips
LEAST_SIDE, MOST_SIDE = 32, 16384  # pixels
MOST_OBLONG = 8.0  # longer side / shorter side


@dataclass(frozen=True, eq=False)
class Defect:
    """Rows that share what is wrong with them.

    Args:
        rows: int64, rising. details: what was found, by row; empty where the numbers of the table say it.
        num_checked: rows that were looked at.
    """

    rows: np.ndarray
    num_checked: int
    details: dict[int, str] = field(default_factory=dict)


class BucketCount(NamedTuple):
    """One line of `Diagnosis.per_bucket`: clips that came to it, and what of them the epoch trains on."""

    name: str
    clips: int
    batch_size: int
    micro_batches: int
    left_over: int
    ratios: int  # aspect ratios of it that have clips


class Steps(NamedTuple):
    """How an epoch is dealt to so many processes.

    Args:
        dp_size: those that read different samples.
        unused: micro-batches at the end of the epoch that fill no step.
        problem: why no run of this size would start, "" if it would.
    """

    world_size: int
    dp_size: int
    accumulation: int
    steps: int
    unused: int
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What becomes of the rows of a dataset in one epoch.

    Args:
        outcomes: int8 [N], an index of `OUTCOMES`; 0 where the row is in the plan.
        ids: int32 [N], the row's bucket, -1 for none.
        advice: outcome -> one sentence with the number to change.
        micro_batches: int64 [buckets], in the plan.
        why_empty: training's own message where there is no micro-batch, else "".
    """

    dataset: ClipDataset
    epoch: int
    outcomes: np.ndarray
    ids: np.ndarray
    advice: dict[str, str]
    micro_batches: np.ndarray
    why_empty: str

    @property
    def counts(self) -> dict[str, int]:
        """Outcome -> rows, without those that did not occur; they sum to the rows of the table."""
        found = np.bincount(self.outcomes, minlength=len(OUTCOMES)).tolist()
        return {name: number for name, number in zip(OUTCOMES, found, strict=True) if number}

    @property
    def num_micro_batches(self) -> int:
        return int(self.micro_batches.sum())

    @property
    def per_bucket(self) -> list[BucketCount]:
        """Resolution and frames with clips or batches, aspect ratios summed, in the order of the buckets."""
        buckets = self.dataset.buckets
        clips = np.bincount(self.ids[self.ids >= 0], minlength=len(buckets))
        left = np.bincount(self.ids[self.outcomes == REMAINDER], minlength=len(buckets))
        lines: dict[str, list[int]] = {}
        for b in np.flatnonzero(clips).tolist():
            line = lines.setdefault(buckets.name(b), [0, int(buckets.batch_sizes[b]), 0, 0, 0])
            for place, number in ((0, clips[b]), (2, self.micro_batches[b]), (3, left[b]), (4, 1)):
                line[place] += int(number)
        return [BucketCount(name, *line) for name, line in lines.items()]


def diagnose(dataset: ClipDataset, *, seed: int, epoch: int, whole: Table | ShardedTable | None = None) -> Diagnosis:
    """Find what becomes of every row in one epoch: what the plan of training has, and of other rows why not.

    Args:
        seed: of the run.
        whole: the table before rows were held out for validation, which leaves them no frames.

    Raises:
        ValueError: the dataset plans otherwise than `build_plan`, or whatever it raises but `EmptyPlan`.
    """
    table, buckets = dataset.table, dataset.buckets
    ids = assign_rows(table, buckets, fps_max=dataset.fps_max, seed=seed, epoch=epoch)
    whole = table if whole is None else whole
    dropped = reasons_of_table(whole, buckets, ids, fps_max=dataset.fps_max)
    outcomes = dropped.codes.copy()
    if whole is not table:
        outcomes[np.asarray(whole.num_frames) != table.num_frames] = HELD_OUT
    present = {OUTCOMES[code] for code in np.unique(outcomes)}
    advice = {name: said.partition(": ")[2] for name, said in dropped.advice.items() if name in present}
    micro_batches, why_empty = np.zeros(len(buckets), np.int64), ""
    clips = np.bincount(ids[ids >= 0], minlength=len(buckets))
    try:
        plan = dataset.plan(epoch)
    except EmptyPlan as problem:
        why_empty = str(problem)
        outcomes[ids >= 0] = REMAINDER
    else:
        if not np.array_equal(np.diff(plan.bounds), clips):
            raise ValueError(
                f"dataset {type(dataset).__name__} plans other rows than its table and bucket_config say; only "
                "datasets that use build_plan can be diagnosed"
            )
        micro_batches = np.bincount(plan.bucket_ids[0 : len(plan)], minlength=len(buckets))
        outcomes[_left_over(plan, micro_batches)] = REMAINDER
    if (outcomes == REMAINDER).any():
        advice["batch_remainder"] = _remainder_advice(buckets, clips)
    if "held_out" in present:
        advice["held_out"] = "validation.share of the clips; the held-out loss is measured on them"
    return Diagnosis(dataset, epoch, outcomes, ids, advice, micro_batches, why_empty)


def _left_over(plan: EpochPlan, micro_batches: np.ndarray) -> np.ndarray:
    """Rows with a bucket that no micro-batch of the epoch has. Returns: int64."""
    used = plan.bounds[:-1] + micro_batches * plan.buckets.batch_sizes
    tails = [plan.rows[start:stop] for start, stop in zip(used.tolist(), plan.bounds[1:].tolist(), strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *tails])


def _remainder_advice(buckets: Buckets, clips: np.ndarray) -> str:
    short = np.flatnonzero((clips > 0) & (clips < buckets.batch_sizes))
    if not len(short):
        return "left over after the last full batch of their bucket; other clips are in other epochs"
    largest = short[np.argmax(clips[short])]
    return (
        f"buckets of one ratio with fewer clips than their batch size: {len(short)}, first {buckets.name(largest)} of "
        f"ratio {buckets.ratios[largest]} with {clips[largest]} of {buckets.batch_sizes[largest]}; lower that batch "
        f"size, or use fewer buckets or ratios. What is left over changes from epoch to epoch"
    )


def check_numbers(dataset: ClipDataset) -> dict[str, Defect]:
    """Rates and sizes that are numbers and yet no clip's."""
    table = dataset.table
    num, fps = table.num_rows, np.asarray(table.fps)
    height, width = np.asarray(table.height, np.float64), np.asarray(table.width, np.float64)
    video = np.asarray(table.num_frames) > 1
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    bad_size = (shorter < LEAST_SIDE) | (longer > MOST_SIDE) | (longer > MOST_OBLONG * shorter)
    found = {
        "absurd_fps": video & ((fps < LEAST_FPS) | (fps > MOST_FPS)),
        "absurd_size": bad_size,
        "unknown_fps": video & np.isnan(fps),
    }
    return {name: Defect(np.flatnonzero(rows), num) for name, rows in found.items()}


def check_captions(dataset: ClipDataset) -> dict[str, Defect]:
    """Captions that are empty, and those that an earlier row has already; blanks around them do not count.

    Captions are compared by 64-bit hashes, so that a table need not be in memory.
    """
    from pandas.util import hash_array

    hashes, empty = [], []
    for piece in dataset.table.columns(["text"]):
        text = pc.utf8_trim_whitespace(pc.fill_null(piece["text"].cast(pa.large_string()), ""))
        empty.append(pc.equal(pc.binary_length(text), 0).to_numpy())
        hashes.append(hash_array(text.to_numpy(), categorize=False))
    is_empty = np.concatenate(empty)
    repeated = np.ones(len(is_empty), bool)
    repeated[np.unique(np.concatenate(hashes), return_index=True)[1]] = False
    found = {"empty_caption": is_empty, "duplicate_caption": repeated & ~is_empty}
    return {name: Defect(np.flatnonzero(rows), len(is_empty)) for name, rows in found.items()}


def opens_files(dataset: ClipDataset) -> bool:
    """Whether a dataset reads the files that its table names, not a store of what was made of them."""
    return hasattr(dataset, "data_root")


def check_files(dataset: ClipDataset, rows: np.ndarray) -> Defect:
    """Which of these rows have no file.

    Args:
        dataset: one that opens the table's files, as `video_text` does; see `opens_files`.
        rows: int64, rising.
    """
    table, root, source = dataset.table, dataset.data_root, dataset.data_path
    missing, details = [], {}
    for row, path in zip(rows.tolist(), _paths(table, rows), strict=True):
        file = find_file(path, table_path=source, data_root=root)
        if not os.path.exists(file):  # noqa: PTH110 (of a million files this is called in a row)
            missing.append(row)
            details[row] = f"{file!r} does not exist"
    return Defect(np.array(missing, np.int64), len(rows), details)


def _paths(table: Any, rows: np.ndarray) -> Iterable[str]:
    """Paths of rows, a part at a time, so that those of a large table are never all in memory."""
    for start in range(0, len(rows), 1 << 18):
        yield from table.paths(rows[start : start + (1 << 18)])


def check_reading(diagnosis: Diagnosis, rows: np.ndarray, *, num_workers: int) -> Defect:
    """Read these rows as training does, in the shape of their bucket.

    Args:
        rows: int64, rising, all with a bucket.
        num_workers: processes; 0 reads in this one.
    """
    from torch.utils.data import DataLoader

    attempts = _Attempts(diagnosis.dataset, rows, diagnosis.ids[rows], diagnosis.epoch)
    found = DataLoader(attempts, batch_size=None, num_workers=num_workers)
    details = {int(row): reason for row, reason in zip(rows, found, strict=True) if reason}
    return Defect(np.array(sorted(details), np.int64), len(rows), details)


class _Attempts:
    """What goes wrong when a row is read, "" for nothing; a map-style dataset of torch."""

    def __init__(self, dataset: ClipDataset, rows: np.ndarray, ids: np.ndarray, epoch: int) -> None:
        self.dataset, self.rows, self.ids, self.epoch = dataset, rows, ids, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        if index >= len(self):
            raise IndexError(index)
        shape = self.dataset.buckets.shapes[self.ids[index]]
        try:
            self.dataset.read(int(self.rows[index]), shape, self.epoch)
        except BadSample as problem:
            return problem.reason
        return ""


def nothing_readable(defects: Mapping[str, Defect]) -> list[str]:
    """A line for each way of looking at files that found none it could use."""
    lines = []
    for name, remedy in (("missing_file", "set dataset.data_root"), ("undecodable", "run tools/meta.py on the table")):
        defect = defects.get(name)
        if defect is not None and defect.num_checked and len(defect.rows) == defect.num_checked:
            first = int(defect.rows[0])
            lines.append(f"{name}: all {defect.num_checked} looked at, row {first}: {defect.details[first]}; {remedy}")
    return lines


def choose_rows(rows: np.ndarray, num: int, *, seed: int, purpose: str) -> np.ndarray:
    """At most `num` of these rows, each as likely, a function of the seed. Returns: int64, rising."""
    if len(rows) <= num:
        return rows
    draw = rng.uniform(seed, purpose, 0, rows)
    return np.sort(rows[np.argpartition(draw, num)[:num]])


def usable_frames(dataset: ClipDataset) -> np.ndarray:
    """Frames that each clip with any keeps at `fps_max`, 1 for images. Returns: int64."""
    has_frames = np.asarray(dataset.table.num_frames) > 0
    num_frames, fps = dataset.table.num_frames[has_frames], dataset.table.fps[has_frames]
    known = np.where(np.isfinite(fps) & (fps > 0), fps, np.nan)
    return np.where(num_frames == 1, 1, num_frames // sampling_interval(known, dataset.fps_max))


def write_rows(
    path: Path, diagnosis: Diagnosis, found: dict[str, np.ndarray], details: dict[str, dict[int, str]]
) -> int:
    """Write rows with their numbers as csv: row, path, reason, num_frames, height, width, fps, bucket, detail.

    Args:
        found: reason -> rows, int64; a row stands once for each of its reasons.
        details: reason -> row -> what was found there.

    Returns: how many lines were written.
    """
    from pyarrow import csv

    table, buckets = diagnosis.dataset.table, diagnosis.dataset.buckets
    names = np.array([*(buckets.name(b) for b in range(len(buckets))), ""])  # -1 finds the last
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"row": pa.int64(), "path": pa.string(), "reason": pa.string()}
    kinds |= dict.fromkeys(("num_frames", "height", "width"), pa.int64())
    schema = pa.schema({**kinds, "fps": pa.float64(), "bucket": pa.string(), "detail": pa.string()})
    with csv.CSVWriter(str(path), schema) as writer:
        for reason, rows in found.items():
            said = details.get(reason, {})
            columns: dict[str, Any] = {"row": rows, "path": table.paths(rows), "reason": [reason] * len(rows)}
            columns |= {name: np.asarray(getattr(table, name)[rows]) for name in ("num_frames", "height", "width")}
            columns["fps"] = pa.array(table.fps[rows], from_pandas=True)
            columns["bucket"] = names[diagnosis.ids[rows]].tolist()
            columns["detail"] = [said.get(row, "") for row in rows.tolist()]
            writer.write_table(pa.table(columns).cast(schema))
    return sum(len(rows) for rows in found.values())
