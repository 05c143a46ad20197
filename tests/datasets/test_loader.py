"""Batches come whole and in order, whatever the number of workers and whatever cannot be read."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opensora_like.datasets.batch import Batch, Sample
from opensora_like.datasets.bucket import BucketShape
from opensora_like.datasets.loader import BadSampleLog, make_loader, read_batch
from opensora_like.datasets.plan import MicroBatch
from opensora_like.datasets.video_io import BadSample
from opensora_like.datasets.video_text import VideoText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_clips import numbered_frames, write_clip

SHAPE = BucketShape("144p", 4, 48, 64)


class Numbers:
    """Rows that are their own pixels; some cannot be read."""

    def __init__(self, bad=()):
        self.bad = frozenset(bad)

    def read(self, row, shape, epoch):
        if row in self.bad:
            raise BadSample(f"{row}.mp4", "is bad")
        video = torch.full((3, shape.num_frames, 2, 2), float(row + 100 * epoch))
        return Sample(row=row, text=f"text {row}", path=f"{row}.mp4", video_CTHW=video)


def micro_batch(index, rows, spares=(), epoch=0):
    return MicroBatch(epoch, index, SHAPE, np.array(rows, np.int64), np.array(spares, np.int64))


def endless():
    for epoch in itertools.count():
        for index in range(3):
            yield micro_batch(index, [4 * index + i for i in range(4)], [20, 21], epoch=epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_replacement_do_not_depend_on_workers(num_workers):
    """A stream without end is followed exactly; a bad row's place is taken by the next spare that is not in use."""
    stream = make_loader(Numbers(bad=[5, 20]), endless(), num_workers=num_workers, prefetch_factor=1)
    batches = list(itertools.islice(stream, 7))
    assert [(b.epoch, b.index) for b in batches] == [(e, i) for e in range(3) for i in range(3)][:7]
    assert [b.rows for b in batches[:3]] == [[0, 1, 2, 3], [4, 21, 6, 7], [8, 9, 10, 11]]
    assert batches[1].bad == [(5, "5.mp4", "is bad"), (20, "20.mp4", "is bad")]
    assert batches[4].video_BCTHW[:, 0, 0, 0, 0].tolist() == [104, 121, 106, 107]
    assert batches[1].text == ["text 4", "text 21", "text 6", "text 7"]
    assert batches[1].paths[1] == "21.mp4"
    assert all(isinstance(b, Batch) and isinstance(b.shape, BucketShape) and len(b) == 4 for b in batches)
    assert all(b.video_BCTHW.is_contiguous() and b.latents_BCTHW is None for b in batches)


def test_no_row_is_twice_in_a_batch():
    """Property: with random bad rows and overlapping spares, rows stay distinct, good and as many as asked for."""
    rng = np.random.default_rng(0)
    for index in range(50):
        rows = rng.permutation(30)
        bad = set(rng.choice(30, 5, replace=False).tolist())
        batch = read_batch(Numbers(bad), micro_batch(index, rows[:6], rows[3:20]))
        assert len(set(batch.rows)) == 6
        assert not bad & set(batch.rows)
        assert all(batch.rows[i] == row for i, row in enumerate(rows[:6].tolist()) if row not in bad)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_when_the_spares_are_used_up_the_files_are_named(num_workers):
    """The error lists every file that failed, with its reason, and no worker's traceback."""
    stream = make_loader(Numbers(bad=[1, 7, 8]), iter([micro_batch(5, [0, 1], [7, 8])]), num_workers=num_workers)
    with pytest.raises(ValueError, match="micro-batch 5 of epoch 0") as caught:
        next(stream)
    assert all(f"row {row} '{row}.mp4': is bad" in str(caught.value) for row in (1, 7, 8))
    assert "Traceback" not in str(caught.value)


def test_the_process_generator_is_not_touched():
    """Loading draws nothing from torch's own generator, so it cannot change a run."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(itertools.islice(make_loader(Numbers(), endless(), num_workers=1), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_use_one_thread():
    """A worker per core is enough; more threads would fight over them."""

    class Threads(Numbers):
        def read(self, row, shape, epoch):
            sample = super().read(row, shape, epoch)
            sample.text = str(torch.get_num_threads())
            return sample

    assert set(next(make_loader(Threads(), endless(), num_workers=1)).text) == {"1"}


def test_samples_of_two_shapes_are_named():
    """What cannot be stacked is an error with both shapes, and cached embeddings are stacked by name."""

    class Mixed(Numbers):
        def read(self, row, shape, epoch):
            sample = super().read(row, shape, epoch)
            sample.embeddings = {"text": torch.zeros(5 + (row == 3), 2)}
            return sample

    batch = read_batch(Mixed(), micro_batch(0, [0, 1]))
    assert batch.embeddings["text"].shape == (2, 5, 2)
    with pytest.raises(ValueError, match=r"text of '3.mp4' is \(6, 2\), that of '0.mp4' .* \(5, 2\)"):
        read_batch(Mixed(), micro_batch(0, [0, 3]))


def test_real_clips_through_workers(tmp_path):
    """A plan over real files: every clip once, a broken one replaced, the same pixels with and without workers."""
    for i in range(6):
        write_clip(tmp_path / f"{i}.mp4", numbered_frames(12, 144, 256), options={"g": "6", "preset": "ultrafast"})
    (tmp_path / "2.mp4").write_bytes(b"broken")
    columns = {"path": [f"{i}.mp4" for i in range(6)], "text": [f"clip {i}" for i in range(6)]}
    columns |= {"num_frames": [12] * 6, "height": [144] * 6, "width": [256] * 6, "fps": [24.0] * 6}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    build = {"bucket_config": {"144p_ar16:9": {8: (1.0, 2)}}, "multiple": 16, "seed": 0}
    data = VideoText(str(tmp_path / "t.parquet"), **build)
    plan = data.plan(0)
    runs = [list(make_loader(data, (plan[i] for i in range(len(plan))), num_workers=n)) for n in (0, 2)]
    assert [len(b) for b in runs[0]] == [2, 2, 2]
    for batch, other, planned in zip(*runs, plan, strict=True):
        assert (batch.rows, batch.text, batch.bad) == (other.rows, other.text, other.bad)
        assert torch.equal(batch.video_BCTHW, other.video_BCTHW)
        assert batch.video_BCTHW.shape == (2, 3, 8, *planned.shape[2:])
        kept = [row for row in planned.rows.tolist() if row != 2]
        assert [row for row in batch.rows if row in kept] == kept
    assert [bad[0] for batch in runs[0] for bad in batch.bad] == [2]


def batch_with(num_good, bad=(), epoch=0):
    rows = list(range(num_good))
    return Batch(epoch, 0, SHAPE, rows, [""] * num_good, [""] * num_good, bad=list(bad))


def test_bad_samples_are_written_and_limited(tmp_path):
    """Each bad row is one line; past the budget the run stops with both numbers, but not on the first few samples."""
    log = BadSampleLog(tmp_path / "run" / "bad_samples.jsonl", max_bad_fraction=0.1, min_seen=20)
    log.record(batch_with(3, [(7, "a.mp4", "is bad"), (8, "ä.mp4", "empty")], epoch=2))
    log.record(batch_with(15))
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert lines[0] == {"row": 7, "path": "a.mp4", "reason": "is bad", "epoch": 2}
    assert [line["path"] for line in lines] == ["a.mp4", "ä.mp4"]
    log.record(batch_with(4))
    with pytest.raises(ValueError, match=r"4 of 26 samples .* max_bad_fraction=0.1 allows 2"):
        log.record(batch_with(0, [(1, "b", "x"), (2, "c", "x")]))
    with pytest.raises(ValueError, match=r"max_bad_fraction=1.5"):
        BadSampleLog(tmp_path / "x", max_bad_fraction=1.5)
