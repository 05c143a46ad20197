"""What the command-line doors share: reading the command, and errors without a traceback where the user is asked."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_like.config import config_text, read_config

EXIT_USER_ERROR = 2
# what the system answers where the program, not the user, asked for the wrong thing
MISTAKES = (errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTTY, errno.ESPIPE, errno.ECHILD)


@dataclass(frozen=True)
class Command:
    """A command line that was read. `is_done` when it only asked for something to be printed."""

    config: Any
    config_name: str
    is_done: bool


def read_command_line(arguments: list[str], *, schema: type, usage: str) -> Command:
    """Read ``CONFIG [--dump] [--explain KEY] [overrides]``.

    Raises:
        ValueError: no config, or whatever `read_config` finds.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stderr if not arguments else sys.stdout)
        if arguments:
            return Command(None, "", True)
        raise ValueError("the first argument is the path of a config")
    path, rest = arguments[0], list(arguments[1:])
    dump = "--dump" in rest
    if dump:
        rest.remove("--dump")
    asked = []
    while "--explain" in rest:
        at = rest.index("--explain")
        if at + 1 >= len(rest):
            raise ValueError("--explain needs a key, for example --explain optim.lr")
        asked.append(rest[at + 1])
        del rest[at : at + 2]
    explained = read_config(path, rest, schema=schema)
    if dump:
        print(config_text(explained.config), end="")
    for key in asked:
        print(explained.explain(key))
    return Command(explained.config, path, dump or bool(asked))


def run_guarded(prepare: Callable[[list[str]], Callable[[], int]]) -> int:
    """Prepare with the command line, then work.

    What goes wrong while preparing is the user's to mend, be it an input or the disk: it is printed in one line
    (OPENSORA_LIKE_TRACEBACK=1 shows where it was found), before processes know of each other once per machine. What
    goes wrong at work is raised in full.

    Args:
        prepare: reads the command line and builds; returns the work, which returns the exit code.
    """
    try:
        work = prepare(sys.argv[1:])
    except (ValueError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno in MISTAKES:
            raise
        if os.environ.get("OPENSORA_LIKE_TRACEBACK"):
            traceback.print_exc()
        reason = str(problem)
        if isinstance(problem, OSError) and problem.errno is not None and problem.filename is None:  # names no place
            reason += "; OPENSORA_LIKE_TRACEBACK=1 shows where"
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK") == "0" or (  # files and rights may be those of one machine
            "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        ):
            print(f"{Path(sys.argv[0]).name}: rank {rank}: {reason}", file=sys.stderr)
        return EXIT_USER_ERROR
    return work()
