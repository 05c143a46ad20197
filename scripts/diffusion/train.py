"""Train a denoiser.

torchrun --nproc_per_node N scripts/diffusion/train.py CONFIG [--dump] [--explain KEY] [--key value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from opensora_like import runtime as rt
from opensora_like.cli import read_command_line, run_guarded
from opensora_like.settings import RunConfig

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; run again with --load latest


def prepare(arguments: list[str]) -> Callable[[], int]:
    command = read_command_line(arguments, schema=RunConfig, usage=__doc__)
    if command.is_done:
        return lambda: 0
    runtime = rt.start(timeout_minutes=command.config.timeout_minutes)
    from opensora_like.evaluation.observe import RunObserver  # here: it imports all that --dump does without
    from opensora_like.training.build import build_run
    from opensora_like.training.trainer import train

    run = build_run(command.config, runtime, config_name=command.config_name, observe=RunObserver)

    def work() -> int:
        finished = train(run)
        rt.finish()
        return 0 if finished else EXIT_STOPPED

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
