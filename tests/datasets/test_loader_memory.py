"""Reading for days opens no more files and takes no more memory than for a minute, with any number of workers."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opensora_like.datasets import video_io
from opensora_like.datasets.batch import Sample
from opensora_like.datasets.bucket import BucketShape
from opensora_like.datasets.loader import make_loader
from opensora_like.datasets.video_text import VideoText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_clips import note_decoded, numbered_frames, numbers_of, write_clip

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc of Linux")
KEYFRAME_EVERY, WINDOW = 12, 5
SHAPE = BucketShape("144p", WINDOW, 96, 128)


def clips(folder: Path, lengths: list[int]) -> VideoText:
    """A dataset of real clips of 96 x 128 pixels."""
    how = {"options": {"g": str(KEYFRAME_EVERY), "preset": "ultrafast"}}
    for i, length in enumerate(lengths):
        write_clip(folder / f"{i}.mp4", numbered_frames(length, 96, 128), **how)
    count = len(lengths)
    columns = {"path": [f"{i}.mp4" for i in range(count)], "text": ["a clip"] * count, "num_frames": lengths}
    columns |= {"height": [96] * count, "width": [128] * count, "fps": [24.0] * count}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return VideoText(str(folder / "t.parquet"), bucket_config={"128px": {WINDOW: (1.0, 2)}}, multiple=16, seed=0)


def kib(field: str, process: int | str = "self") -> int:
    """The sum of the lines of smaps_rollup that begin with `field`."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field))


def test_2000_reads_leave_no_file_open_and_no_memory(tmp_path: Path) -> None:
    """Good clips and one that is cut off: after 2,000 reads as many files are open as after 300, in as much memory."""
    data = clips(tmp_path, [30, 40, 25, 30])
    whole = (tmp_path / "3.mp4").read_bytes()
    (tmp_path / "3.mp4").write_bytes(whole[: len(whole) * 2 // 3])

    def read(first: int, last: int) -> None:
        for number in range(first, last):
            try:
                data.read(number % 4, SHAPE, epoch=number)
            except video_io.BadSample:
                assert number % 4 == 3

    read(0, 300)
    files, memory = len(list(Path("/proc/self/fd").iterdir())), kib("Rss")
    read(300, 2000)
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    # a clip of one sample is 180 KiB in bytes and 720 KiB in float32: were one in ten kept, it would show
    assert kib("Rss") - memory < 16 * 1024


def test_a_long_clip_costs_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 frames as few are decoded as of 60: at most those from a keyframe to the end of the window."""
    data = clips(tmp_path, [60, 600])
    decoded = note_decoded(monkeypatch)
    begins = set()
    for row, epoch in itertools.product((0, 1), range(12)):
        decoded.clear()
        sample = data.read(row, SHAPE, epoch)
        frames = ((sample.video_CTHW.permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).round().byte().numpy()
        begins.add((row, numbers_of(frames)[0]))
        assert WINDOW <= len(decoded) <= KEYFRAME_EVERY + WINDOW + 3  # frames that are coded before they are shown
    assert len(begins) > 15  # the windows lay all over the clips


class Rows(VideoText):
    """Looks rows up and reads no file."""

    def read(self, row, shape, epoch):
        values = self.table.row(row)
        return Sample(row=row, text=values["text"], path=values["path"], video_CTHW=torch.zeros(1, 1, 1, 1))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, int]:
    """A table of 3 million rows in memory, and its bytes."""
    count = 3_000_000
    names = pa.array(np.arange(count)).cast(pa.string())
    ones = np.full(count, 1)
    columns = {"path": names, "text": names, "num_frames": ones * 40, "height": ones * 256, "width": ones * 256}
    file = tmp_path_factory.mktemp("large") / "t.parquet"
    pq.write_table(pa.table(columns | {"fps": ones * 24.0}), file)
    data = Rows(str(file), bucket_config={"256px": {33: (1.0, 50)}}, multiple=16, seed=0)
    table = data.table
    size = table.other.nbytes + sum(a.nbytes for a in (table.num_frames, table.height, table.width, table.fps))
    return data, size


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_four_workers_share_the_table_of_one(large: tuple[Rows, int]) -> None:
    """Rows all over a table of over 150 MiB are read; what a worker has of its own stays below a third of that."""
    data, size = large
    assert size > 150 * 2**20
    own: dict[int, list[float]] = {}
    for num_workers in (1, 4):
        plan, others = data.plan(0), multiprocessing.active_children()
        batches = make_loader(data, (plan[i] for i in range(len(plan))), num_workers=num_workers)
        seen = [row for batch in itertools.islice(batches, 60) for row in batch.rows]
        assert len(set(seen)) == 3000 and max(seen) - min(seen) > 2_500_000
        workers = [process.pid for process in multiprocessing.active_children() if process not in others]
        assert len(workers) == num_workers
        own[num_workers] = [kib("Private", pid) * 1024 / size for pid in workers]
        del batches
    assert max(own[1] + own[4]) < 1 / 3, own
    assert max(own[4]) < 1.2 * own[1][0] + 0.05, own
