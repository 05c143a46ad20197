"""What one setting gains: whole steps with and without it in turn, in one run.

python tools/bench_switches.py CONFIG --compile_blocks inductor [--num_steps 40] [-- --key value ...]
torchrun --nproc_per_node 2 tools/bench_switches.py CONFIG --booster.plugin_config "{'reduce_bucket_size_in_m': 1}"

Settings before `--` make the difference, those after it hold for both. The first steps of each, in which compilation
takes place, are not counted. The median step of each block counts, so that a pause of the machine does not.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from opensora_like import runtime as rt
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.training.trainer import Run, train
from tools.bench_trainer import build_silent, parser_of

NUM_BLOCKS = 4
WARM_UP = 5


def step_seconds(run: Run, num_steps: int) -> list[float]:
    """Seconds of each of the next steps of the loop, from the file to the metrics."""
    ends = [time.perf_counter()]
    inner = run.checkpoints.check  # called once at the end of each step

    def check() -> None:
        inner()
        if run.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    run.checkpoints.check = check
    run.schedule.total_steps = run.state.step + num_steps
    try:
        train(run)
    finally:
        run.checkpoints.check = inner
    return [after - before for before, after in itertools.pairwise(ends)]


def prepare(arguments: list[str]) -> Callable[[], int]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    common = arguments[cut + 1 :]
    given, switch = parser_of("bench_switches.py", __doc__, num_steps=40).parse_known_args(arguments[:cut])
    if not switch:
        raise ValueError("there is nothing to compare: give the setting that makes the difference, --key value")
    runtime = rt.start()
    folder = f"bench_switches-{time.time_ns()}" if runtime.world_size == 1 else "bench_switches"
    fixed = ["--outputs", tempfile.gettempdir(), "--tensorboard", "False", "--ckpt_every", "0"]
    runs = [
        build_silent(
            read_config(given.config, [*common, *more, *fixed, "--exp_name", f"{folder}{number}"]).config,
            runtime,
            config_name=given.config,
        )
        for number, more in enumerate(([], switch))
    ]

    def work() -> int:
        seconds: list[list[float]] = [[], []]
        for run in runs:
            step_seconds(run, WARM_UP)
        for _ in range(NUM_BLOCKS):
            for run, found in zip(runs, seconds, strict=True):
                found.append(statistics.median(step_seconds(run, max(1, given.num_steps // NUM_BLOCKS))))
        without, with_it = (1000 * statistics.median(found) for found in seconds)
        if runtime.is_main:
            print(
                f"{' '.join(switch)}: {with_it:.1f} ms a step, {without:.1f} ms without: {without / with_it:.2f} times"
            )
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
