"""A command that fails for a reason that the user can mend says so in one line; mistakes of the program show where."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from opensora_like.cli import EXIT_USER_ERROR, run_guarded


def _failing(problem: Exception) -> Callable[[list[str]], Callable[[], int]]:
    def prepare(arguments: list[str]) -> Callable[[], int]:
        raise problem

    return prepare


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/data/a.csv"), "'/data/a.csv'"),
        (OSError(errno.EISDIR, os.strerror(errno.EISDIR), "/data"), "Is a directory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; OPENSORA_LIKE_TRACEBACK=1"),
        (OSError("'a.safetensors' cannot be written; make room"), "prog: 'a.safetensors' cannot be written; make room"),
    ],
)
def test_what_the_disk_refuses_is_one_line(capsys, monkeypatch, problem, said):
    """It names the file where the system does, and otherwise how to find out."""
    monkeypatch.setattr("sys.argv", ["prog"])
    monkeypatch.delenv("RANK", raising=False)
    assert run_guarded(_failing(problem)) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert said in error and error.startswith("prog: ") and error.count("\n") == 1


def test_a_mistake_of_the_program_keeps_its_traceback():
    """A bad descriptor is nothing that a user can mend."""
    with pytest.raises(OSError, match="descriptor"):
        run_guarded(_failing(OSError(errno.EBADF, os.strerror(errno.EBADF))))


def test_every_machine_speaks_once(capsys, monkeypatch):
    """A disk that only the second machine lacks is told, though rank 0 knows nothing of it."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for rank, local, told in (("8", "0", True), ("9", "1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert run_guarded(_failing(FileNotFoundError("no 'a.csv'"))) == EXIT_USER_ERROR
        assert ("rank 8: no 'a.csv'" in capsys.readouterr().err) == told
