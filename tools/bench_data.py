"""Measure what a large table costs: cutting, the first start, the next epoch, memory, and reading with workers.

python tools/bench_data.py [--rows 100000000] [--folder /tmp/bench_data] [--keep] [--clips 12]

Prints one json object. "first_start" reads and checks every shard, finds the class of every row and lays out epoch 0;
"next_epoch" is what every later epoch begins with; "restart" is a process that finds the index on disk.
Memory is the highest resident set without the pages of mapped files, which the system takes back when it needs them;
that of workers is the proportional set, in which a page that n processes share counts 1/n to each.
"reading" is CPU time per clip of 33 frames in a row, somewhere in a file of 480, with one decoder thread, beside that
of torchcodec where it is installed. --rows 0 measures this only, --clips 0 leaves it out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like.datasets.balance import Balance, balance_plan
from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.cost import CostModel, Grid
from opensora_like.datasets.plan import build_plan
from opensora_like.datasets.shard_writer import ROWS_PER_SHARD, write_pieces
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.video_io import read_frames
from opensora_like.datasets.video_writing import write_video
from tools.bench_meta import WINDOW, moving_frames

CONFIG = Path(__file__).resolve().parents[1] / "configs/_base_/buckets_stage1.py"
OPTIONS = {"fps_max": 24.0, "seed": 42}


def pieces(num_rows: int) -> Iterator[pa.Table]:
    """A mixed table: 30% images, clips of 2 to 400 frames, up to 1200x2000 pixels, captions of 60 characters."""
    rng = np.random.default_rng(0)
    captions = pa.array([f"caption {i} of a clip in which something happens, told at length" for i in range(5000)])
    for start in range(0, num_rows, ROWS_PER_SHARD):
        num = min(ROWS_PER_SHARD, num_rows - start)
        image = rng.random(num) < 0.3
        names = pa.array(np.arange(start, start + num)).cast(pa.string())
        yield pa.table(
            {
                "path": pc.binary_join_element_wise("videos/part/clip_", names, ".mp4", ""),
                "text": captions.take(pa.array(rng.integers(0, len(captions), num))),
                "num_frames": np.where(image, 1, rng.integers(2, 400, num)),
                "height": rng.integers(100, 1200, num),
                "width": rng.integers(100, 2000, num),
                "fps": np.where(image, np.nan, rng.choice([23.976, 24, 25, 29.97, 30, 60], num)),
            }
        )


def status(field: str, process: int | str = "self") -> int:
    """A line of /proc/<process>/status or smaps_rollup, in bytes."""
    file = "smaps_rollup" if field == "Pss" else "status"
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{process}/{file} has no {field}")


class Peak:
    """The highest memory of this process in a block: anonymous, and all that is resident."""

    def __enter__(self) -> Peak:
        self.anonymous, self.resident, self._done = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, status("RssAnon"))
            self.resident = max(self.resident, status("VmRSS"))
            if self._done.wait(0.05):
                return


def start(folder: Path, epoch: int, queue: multiprocessing.Queue) -> None:
    """In a fresh process: open, lay out and balance an epoch, read its first micro-batch."""
    buckets = read_buckets()
    wall, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        table = ShardedTable(folder)
        plan = build_plan(table, buckets, **OPTIONS, epoch=epoch)
        planned = time.perf_counter() - wall
        costs = CostModel(per_token=1.0, per_token_pair=1e-4).of_buckets(buckets, Grid())
        plan = balance_plan(plan, Balance(costs), seed=42)
        rows = [table.row(row)["path"] for row in plan[0].rows.tolist()]
    queue.put(
        {
            "wall_s": round(time.perf_counter() - wall, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "plan_s": round(planned, 2),
            "peak_anonymous_gib": round(peak.anonymous / 2**30, 2),
            "peak_resident_gib": round(peak.resident / 2**30, 2),
            "micro_batches": len(plan),
            "rows_with_a_bucket": len(plan.rows),
            "first": rows[0],
        }
    )


def in_process(*arguments: object) -> dict:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=start, args=(*arguments, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def read_buckets():
    from mmengine.config import Config

    return compile_buckets(Config.fromfile(str(CONFIG))["bucket_config"], multiple=16)


def worker_memory(folder: Path, num_workers: int, num_batches: int) -> dict:
    """Proportional memory of a process with a plan and loader workers that have read rows all over the table."""
    context = multiprocessing.get_context("fork")
    table = ShardedTable(folder)
    plan = build_plan(table, read_buckets(), **OPTIONS, epoch=1)
    jobs, done = context.Queue(), context.Queue()

    def work() -> None:
        while (rows := jobs.get()) is not None:
            done.put(len([table.row(row) for row in rows]))

    workers = [context.Process(target=work) for _ in range(num_workers)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    for index in range(num_batches):
        jobs.put(plan[index].rows.tolist())
    num_rows = sum(done.get() for _ in range(num_batches))
    seconds = time.perf_counter() - began
    memory = {"main": status("Pss"), "workers": [status("Pss", worker.pid) for worker in workers]}
    resident = [status("VmRSS", worker.pid) for worker in workers]
    for _ in workers:
        jobs.put(None)
    for worker in workers:
        worker.join()
    return {
        "total_pss_mib": round((memory["main"] + sum(memory["workers"])) / 2**20),
        "worker_pss_mib": [round(m / 2**20) for m in memory["workers"]],
        "worker_rss_mib": [round(m / 2**20) for m in resident],
        "rows_per_s": round(num_rows / seconds),
    }


def clip_readers() -> dict[str, Callable[[Path, int], np.ndarray]]:
    """Name -> what reads `WINDOW` frames from a number on, uint8 [T, H, W, 3]."""
    readers = {"ours": lambda path, begin: read_frames(path, range(begin, begin + WINDOW))}
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as problem:  # the last two: without FFmpeg's libraries, or with others
        print(f"torchcodec is left out: {str(problem).splitlines()[0]}", file=sys.stderr)
        return readers
    for mode in ("exact", "approximate"):

        def read(path: Path, begin: int, mode: str = mode) -> np.ndarray:
            decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode=mode)
            return decoder.get_frames_in_range(begin, begin + WINDOW).data.numpy()

        readers[f"torchcodec_{mode}"] = read
    return readers


def reading(num_clips: int, *, num_frames: int = 480, rounds: int = 3) -> dict:
    """CPU milliseconds per clip, the median of all clips and rounds, and how far the pixels are from ours."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        frames = moving_frames(96, 360, 640)[np.arange(num_frames) % 96]
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, 24)
        begins = np.random.default_rng(0).integers(0, num_frames - WINDOW + 1, num_clips).tolist()
        readers = clip_readers()
        wanted = readers["ours"](path, begins[0]).astype(int)
        spent: dict[str, list[float]] = {name: [] for name in readers}
        for name, read in readers.items():
            found[name] = {"most_different_pixel": int(np.abs(read(path, begins[0]) - wanted).max())}
        for _ in range(rounds):
            for begin in begins:
                for name, read in readers.items():  # in turn, so that what else the machine does hits all alike
                    began = time.process_time()
                    read(path, begin)
                    spent[name].append(time.process_time() - began)
    return {name: {"cpu_ms_per_clip": round(1e3 * float(np.median(spent[name])), 1), **found[name]} for name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_data"))
    parser.add_argument("--keep", action="store_true", help="leave the shards, and use those that are there")
    parser.add_argument("--clips", type=int, default=12, help="windows that are read")
    args = parser.parse_args()
    found: dict[str, object] = {"rows": args.rows, "cores": os.cpu_count()}
    if args.clips:
        found["reading"] = reading(args.clips)
    if args.rows:
        measure_table(args, found)
    print(json.dumps(found, indent=1))


def measure_table(args: argparse.Namespace, found: dict[str, object]) -> None:
    """Add what a table of so many rows costs."""
    if not args.folder.exists():
        args.folder.mkdir(parents=True)
        began = time.perf_counter()
        about = {"name": "synthetic", "bytes": 0}
        with Peak() as peak:
            write_pieces(pieces(args.rows), args.folder, num_rows=args.rows, per_shard=ROWS_PER_SHARD, source=about)
        found["write"] = {
            "wall_s": round(time.perf_counter() - began, 1),
            "peak_anonymous_gib": round(peak.anonymous / 2**30, 2),
        }
    found["parquet_gib"] = round(sum(f.stat().st_size for f in args.folder.glob("*.parquet")) / 2**30, 2)
    shutil.rmtree(args.folder / "index")
    found["first_start"] = in_process(args.folder, 0)
    found["next_epoch"] = in_process(args.folder, 1)
    found["restart"] = in_process(args.folder, 1)
    found["workers"] = {n: worker_memory(args.folder, n, 200) for n in (1, 4)}
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
