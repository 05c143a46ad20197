"""Sample videos or images.

python scripts/diffusion/inference.py CONFIG (--prompt TEXT | --prompts CSV) [--ckpt-path CHECKPOINT] [--key value ...]
Under torchrun the files to make are shared out among the processes; with --sp-size each video is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from opensora_like import runtime as rt
from opensora_like.cli import read_command_line, run_guarded
from opensora_like.evaluation.flags import translate
from opensora_like.settings import InferenceConfig


def prepare(arguments: list[str]) -> Callable[[], int]:
    command = read_command_line(translate(arguments), schema=InferenceConfig, usage=__doc__)
    if command.is_done:
        return lambda: 0
    from opensora_like.evaluation.sampling import build_sampling  # here: it imports all that --dump does without

    runtime = rt.start(timeout_minutes=command.config.timeout_minutes)
    rt.set_up_logging(runtime)
    sample = build_sampling(command.config, runtime)

    def work() -> int:
        sample()
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
