"""Sample the prompts of a prepared dataset with the weights of a checkpoint.

python scripts/diffusion/validate.py [CONFIG] --meta_folder FOLDER [--checkpoint PATH | RUN/LATEST] [--key value ...]
Under torchrun the prompts are shared out among the processes. --help prints the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from opensora_like import runtime as rt
from opensora_like.cli import run_guarded


def prepare(arguments: list[str]) -> Callable[[], int]:
    from opensora_like.evaluation.validate import USAGE, build_validation, read_request

    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return lambda: 0
    request = read_request(arguments)
    runtime = rt.start(timeout_minutes=request.config.timeout_minutes)
    rt.set_up_logging(runtime)
    sample = build_validation(request, runtime)

    def work() -> int:
        sample()
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
