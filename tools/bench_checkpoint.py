"""Measure what a checkpoint costs: how long a step waits, how fast the disk is used, how much memory is taken.

python tools/bench_checkpoint.py FOLDER [--parameters 1e8] [--processes 2] [--repeats 3]

A model of linears with AdamW and EMA behind DDP; a step is a fixed number of matrix products. `dd` with fsync, one per
process at once, writes as many random bytes, which are in the page cache, to the same disk in the same run, and reads
them back. Reads are after the page cache was told to forget the files. Each number is the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # an optimizer imports it when it is made; here, so that forks have it
import torch.distributed as dist
from torch import nn

from opensora_like.boosters.ddp import DDPBooster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.cli import run_guarded
from opensora_like.training.ema import EMA
from tests.distributed.forks import World

WIDTH = 1024
MIB = 2**20


def make_manager(folder: Path, *, parameters: float, async_io: bool) -> CheckpointManager:
    """Weights, moments and EMA of about so many parameters."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, round(parameters / WIDTH**2)))]
    booster = DDPBooster(dtype="fp32", device=torch.device("cpu"))
    booster.prepare(nn.Sequential(*layers), torch.optim.AdamW)
    ema = EMA(booster, 0.99)
    return CheckpointManager(
        folder, booster, ema=ema.shards, config_text="", keep_n_latest=1, order={}, about={}, async_io=async_io
    )


def peak_mib(*, reset: bool = False) -> float:
    """Largest resident size of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget(folder: Path) -> None:
    """Let the page cache drop the files below `folder`."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Steps:
    """A stand-in for training: every step costs the same, and ranks finish it together."""

    def __init__(self) -> None:
        self._a = torch.randn(512, 512)

    def one(self) -> float:
        """Returns: seconds."""
        began = time.perf_counter()
        for _ in range(20):
            self._a @ self._a
        dist.barrier()
        return time.perf_counter() - began


def measure_saves(manager: CheckpointManager, repeats: int, *, is_async: bool) -> dict[str, list[float]]:
    """Seconds: "step" without a save and "during" one, "wait" in `save`, "write" until published."""
    steps, found = Steps(), {"step": [], "during": [], "wait": [], "write": []}
    for number in range(repeats + 1):
        usual = [steps.one() for _ in range(30)]
        began = time.perf_counter()
        manager.save(TrainState(step=number + 1))
        waited = time.perf_counter() - began
        during = []
        while is_async and not _all_done(manager):
            during.append(steps.one())
        manager.wait()
        if number:  # the first one allocates
            found["step"] += usual
            found["during"] += during
            found["wait"].append(waited)
            found["write"].append(time.perf_counter() - began)
    found["during"] = found["during"] or found["step"]
    return found


def _all_done(manager: CheckpointManager) -> bool:
    done = torch.tensor(float(manager._pending is None or manager._pending.done()))
    dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


def measure(folder: Path, parameters: float, repeats: int, *, is_async: bool) -> dict[str, float]:
    """In one rank: a manager's saves, its memory, and its loads."""
    manager = make_manager(folder / "run", parameters=parameters, async_io=is_async)
    for tensors in manager.booster.optimizer_shards().values():
        for tensor in tensors.values():
            tensor.uniform_()
    before = peak_mib(reset=True)
    found = {name: statistics.median(v) for name, v in measure_saves(manager, repeats, is_async=is_async).items()}
    found["memory_mib"] = peak_mib() - before
    loads, spreads = [], []
    refresh = manager.booster.refresh

    def timed_refresh() -> None:
        """What comes after reading: every rank needs the weights that the others own."""
        dist.barrier()
        began = time.perf_counter()
        refresh()
        dist.barrier()
        spreads.append(time.perf_counter() - began)

    manager.booster.refresh = timed_refresh
    checkpoint = layout.complete_checkpoints(folder / "run")[-1]
    found["own_mib"] = sum(f.stat().st_size for f in checkpoint.glob(f"*.rank{dist.get_rank():05d}.*")) / MIB
    for _ in range(repeats):
        dist.barrier()
        forget(checkpoint)
        manager._intact.clear()
        dist.barrier()
        began = time.perf_counter()
        manager.load(checkpoint)
        dist.barrier()
        loads.append(time.perf_counter() - began)
    reads = [load - spread for load, spread in zip(loads, spreads, strict=True)]
    return found | {"read": statistics.median(reads), "spread": statistics.median(spreads)}


def dd_seconds(folder: Path, mib: int, processes: int, *, write: bool) -> float:
    """`processes` dd at once, of `mib` each."""
    folder.mkdir(exist_ok=True)
    source = folder.parent / "random"
    if not source.exists():
        source.write_bytes(torch.randint(0, 256, (mib, MIB), dtype=torch.uint8).numpy().data)
    for file in folder.iterdir():
        file.unlink() if write else None
    if not write:
        forget(folder)
    began = time.perf_counter()
    running = []
    for number in range(processes):
        file = folder / f"{number}"
        how = [f"if={source}", f"of={file}", "conv=fsync"] if write else [f"if={file}", "of=/dev/null"]
        running.append(subprocess.Popen(["dd", *how, "bs=1M", f"count={mib}"], stderr=subprocess.DEVNULL))
    for process in running:
        if process.wait():
            raise OSError(f"dd failed in {str(folder)!r}: is there room for {processes * mib} MiB?")
    return time.perf_counter() - began


def in_world(folder: Path, given: argparse.Namespace, *, is_async: bool) -> dict[str, float]:
    """Of all ranks the slowest and largest."""

    def work(rank: int) -> None:
        found = measure(folder, given.parameters, given.repeats, is_async=is_async)
        (folder / f"rank{rank}.json").write_text(json.dumps(found))

    codes = World(given.processes, work, log=folder / "log.txt").join(3600)
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}; see {str(folder / 'log.txt')!r}")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(given.processes)]
    shutil.rmtree(folder / "run")
    return {name: max(r[name] for r in ranks) for name in ranks[0]}


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)

    def work() -> int:
        given.folder.mkdir(parents=True, exist_ok=True)
        sync, background = (in_world(given.folder, given, is_async=a) for a in (False, True))
        mib = round(sync["own_mib"])
        total = mib * given.processes
        raw = given.folder / "dd"
        writes = statistics.median(dd_seconds(raw, mib, given.processes, write=True) for _ in range(given.repeats))
        reads = statistics.median(dd_seconds(raw, mib, given.processes, write=False) for _ in range(given.repeats))
        shutil.rmtree(raw)
        (given.folder / "random").unlink()
        print(f"saved {total} MiB by {given.processes} processes; load average {os.getloadavg()[0]:.1f}")
        print(f"sync:  a step waits {sync['wait']:.2f} s; {total / sync['write']:.0f} MiB/s")
        share, rate = background["wait"] / sync["wait"], total / background["write"]
        print(f"async: a step waits {background['wait']:.2f} s, {share:.1%} of sync; {rate:.0f} MiB/s")
        slower, alone = background["during"] / background["step"], 1000 * background["step"]
        print(f"async: steps take {slower:.2f} x as long while a save is written ({alone:.0f} ms alone)")
        print(f"dd:    writes {total / writes:.0f} MiB/s, so sync has {writes / sync['write']:.0%} of it")
        rate = f"{total / sync['read']:.0f} MiB/s with checksums, {reads / sync['read']:.0%} of dd"
        print(f"load:  {rate} ({total / reads:.0f} MiB/s); then {sync['spread']:.2f} s until all have all weights")
        for name, found in (("sync", sync), ("async", background)):
            more = found["memory_mib"]
            print(f"memory of {name}: {more:.0f} MiB more, {more / mib:.2f} x what a rank saves")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
