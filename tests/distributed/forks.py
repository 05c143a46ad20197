"""Worlds of real processes that share one start: torch is imported once, then every rank is a fork.

The parent must not have made a process group, nor run a backward: forks keep no threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


class World:
    """`size` processes that run `work(rank)` in a gloo group of their own.

    Args:
        log: file that gets what all of them print.
    """

    def __init__(self, size: int, work: Callable[[int], None], *, log: Path) -> None:
        self._store = tempfile.mktemp(prefix="store")
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [os.fork() or self._be(rank, size, work, log) for rank in range(size)]
        self.statuses: dict[int, int] = {}

    def _be(self, rank: int, size: int, work: Callable[[int], None], log: Path) -> int:
        """The child; it does not return."""
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.environ["LOCAL_RANK"] = str(rank)
            dist.init_process_group("gloo", store=dist.FileStore(self._store, size), rank=rank, world_size=size)
            work(rank)
            code = 0
        except SystemExit as wish:
            code = int(wish.code or 0)
        except BaseException:  # noqa: BLE001 - a fork must not run on into its parent's code
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL, of those that have not ended."""
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], signal.SIGKILL)

    def join(self, timeout_seconds: float = 120.0, *, grace_seconds: float = math.inf) -> list[int]:
        """Wait for all. Returns: exit codes, negative for signals.

        Args:
            grace_seconds: once one was killed, the others are killed after this time, as a launcher does. A rank that
                makes a process group does not hear that its peer is gone.

        Raises:
            TimeoutError: some did not end; they are killed.
        """
        deadline, patience = time.monotonic() + timeout_seconds, math.inf
        while not self.poll():
            if patience == math.inf and any(code < 0 for code in self.statuses.values()):
                patience = time.monotonic() + grace_seconds
            if time.monotonic() > patience:
                self.kill(list(range(len(self.pids))))
            if time.monotonic() > deadline:
                left = [r for r in range(len(self.pids)) if r not in self.statuses]
                self.kill(left)
                raise TimeoutError(f"ranks {left} did not end in {timeout_seconds} seconds")
            time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):
            Path(self._store).unlink()
        return [self.statuses[rank] for rank in range(len(self.pids))]
