"""Measure what a checkpoint costs: how long a step waits, how fast the disk is used, how much memory is taken.

python tools/bench_checkpoint.py FOLDER [--parameters 1e8] [--processes 2] [--repeats 3] [--tokens 256]

A model of linears with AdamW and EMA behind DDP; a step is a whole one: forward and backward of `--tokens` tokens per
process, gradients averaged, update, EMA. In the background it is measured with these steps and with the shortest there
can be, of one token. What a save makes a step wait is the time in `save` and in `before_update`, which copies what was
not written before the next update. `dd` with fsync, one per process at once, writes as many random bytes, which are in
the page cache, to the same disk in the same run, and reads them back. Reads are after the page cache was told to
forget the files. Each number is the median of the repeats.
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
from torch import Tensor, nn

from opensora_like.boosters.ddp import DDPBooster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.cli import run_guarded
from opensora_like.training.ema import EMA
from tests.distributed.forks import World

WIDTH = 1024
MIB = 2**20


class Residual(nn.Linear):
    """Many in a row neither fade nor explode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Steps:
    """A booster's model with weights, moments and EMA of about so many parameters, and whole steps of it.

    Args:
        tokens: per process and step.
    """

    def __init__(self, parameters: float, tokens: int) -> None:
        layers = [Residual(WIDTH, WIDTH, bias=False) for _ in range(max(1, round(parameters / WIDTH**2)))]
        self.booster = DDPBooster(dtype="fp32", device=torch.device("cpu"))
        self._called = self.booster.prepare(nn.Sequential(*layers), torch.optim.AdamW)
        self.ema, self._x, self._number = EMA(self.booster, 0.99), torch.randn(tokens, WIDTH), 0

    def one(self) -> float:
        """Returns: seconds."""
        began, self._number = time.perf_counter(), self._number + 1
        with self.booster.micro_batch(last=True):
            self.booster.backward(self._called(self._x).square().mean())
        self.booster.step()
        self.ema.update(self._number)
        return time.perf_counter() - began


def make_manager(folder: Path, steps: Steps, *, async_io: bool) -> CheckpointManager:
    """Checkpoints of all that the steps change."""
    return CheckpointManager(
        folder,
        steps.booster,
        ema=steps.ema.shards,
        config_text="",
        keep_n_latest=1,
        order={},
        about={},
        async_io=async_io,
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


def measure_saves(manager: CheckpointManager, steps: Steps, repeats: int) -> dict[str, list[float]]:
    """Seconds: "step" without a save and "during" one, "wait" because of it, "write" until published."""
    found: dict[str, list[float]] = {"step": [], "during": [], "wait": [], "write": []}
    waits: list[float] = []
    secure = manager.before_update

    def timed_secure() -> None:
        began = time.perf_counter()
        secure()
        waits.append(time.perf_counter() - began)

    manager.before_update = timed_secure
    for number in range(repeats + 1):
        usual = [steps.one() for _ in range(2)]
        dist.barrier()
        began = time.perf_counter()
        manager.save(TrainState(step=number + 1))
        waits[:] = [time.perf_counter() - began]  # `save` passes doors itself
        ended = _ended(manager, began)
        during = []
        while not _all_done(manager):
            during.append(steps.one())
        manager.wait()
        ended.append(time.perf_counter() - began)  # where the callback is late
        if number:  # the first one allocates
            found["step"] += usual
            found["during"] += during
            found["wait"].append(sum(waits))
            found["write"].append(ended[0])
    found["during"] = found["during"] or found["step"]
    return found


def _ended(manager: CheckpointManager, began: float) -> list[float]:
    """Gets the seconds from `began` until the save that was started is published, as soon as it is."""
    if manager._pending is None:
        return [time.perf_counter() - began]
    seconds: list[float] = []
    manager._pending.add_done_callback(lambda _: seconds.append(time.perf_counter() - began))
    return seconds


def _all_done(manager: CheckpointManager) -> bool:
    done = torch.tensor(float(manager._pending is None or manager._pending.done()))
    dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


def measure(folder: Path, parameters: float, repeats: int, *, tokens: int, is_async: bool) -> dict[str, float]:
    """In one rank: a manager's saves, its memory, and its loads."""
    steps = Steps(parameters, tokens)
    manager = make_manager(folder / "run", steps, async_io=is_async)
    steps.one()  # it allocates
    peak_mib(reset=True)
    steps.one()
    before = peak_mib()
    peak_mib(reset=True)
    found = {name: statistics.median(v) for name, v in measure_saves(manager, steps, repeats).items()}
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


def in_world(folder: Path, given: argparse.Namespace, *, tokens: int, is_async: bool) -> dict[str, float]:
    """Of all ranks the slowest and largest."""

    def work(rank: int) -> None:
        found = measure(folder, given.parameters, given.repeats, tokens=tokens, is_async=is_async)
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
    parser.add_argument("--tokens", type=int, default=256, help="of a step, per process")
    given = parser.parse_args(arguments)

    def work() -> int:
        given.folder.mkdir(parents=True, exist_ok=True)
        sync = in_world(given.folder, given, tokens=1, is_async=False)
        background = {n: in_world(given.folder, given, tokens=n, is_async=True) for n in (given.tokens, 1)}
        mib = round(sync["own_mib"])
        total = mib * given.processes
        raw = given.folder / "dd"
        writes = statistics.median(dd_seconds(raw, mib, given.processes, write=True) for _ in range(given.repeats))
        reads = statistics.median(dd_seconds(raw, mib, given.processes, write=False) for _ in range(given.repeats))
        shutil.rmtree(raw)
        (given.folder / "random").unlink()
        print(f"saved {total} MiB by {given.processes} processes; load average {os.getloadavg()[0]:.1f}")
        print(f"sync:  a step waits {sync['wait']:.2f} s; {total / sync['write']:.0f} MiB/s")
        for tokens, found in background.items():
            share, rate = found["wait"] / sync["wait"], total / found["write"]
            step, slower = found["step"], found["during"] / found["step"]
            print(
                f"async, {tokens} tokens a step: it waits {found['wait']:.3f} s, {share:.1%} of sync; {rate:.0f} MiB/s"
            )
            print(f"async, {tokens} tokens a step: {step:.2f} s alone, {slower:.2f} x as long while a save is written")
        print(f"dd:    writes {total / writes:.0f} MiB/s, so sync has {writes / sync['write']:.0%} of it")
        rate = f"{total / sync['read']:.0f} MiB/s with checksums, {reads / sync['read']:.0%} of dd"
        print(f"load:  {rate} ({total / reads:.0f} MiB/s); then {sync['spread']:.2f} s until all have all weights")
        for name, found in (("sync", sync), *((f"async, {n} tokens", found) for n, found in background.items())):
            more = found["memory_mib"]
            print(f"memory of {name}: {more:.0f} MiB more, {more / mib:.2f} x what a rank saves")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
