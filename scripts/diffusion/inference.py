"""Sample videos or images.

python scripts/diffusion/inference.py CONFIG --ckpt-path CHECKPOINT (--prompt TEXT | --prompts CSV) [--key value ...]
Under torchrun the prompts are shared out among the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from opensora_like import runtime as rt
from opensora_like.cli import read_command_line, run_guarded
from opensora_like.settings import InferenceConfig


def prepare(arguments: list[str]) -> Callable[[], int]:
    command = read_command_line(arguments, schema=InferenceConfig, usage=__doc__)
    if command.is_done:
        return lambda: 0
    from opensora_like.evaluation.generate import VideoGenerator, read_prompts, save_samples

    runtime = rt.start()
    rt.set_up_logging(runtime)
    prompts = read_prompts(command.config)
    generator = VideoGenerator(command.config, runtime.device)

    def work() -> int:
        save_samples(generator, prompts[runtime.rank :: runtime.world_size])
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
