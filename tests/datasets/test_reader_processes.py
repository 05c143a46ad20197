"""Reading processes go on when a whole group is told to stop, and are gone when the process that reads from them is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import itertools, multiprocessing, os, sys
from opensora_like.runtime import StopSignal, start
from tests.datasets.test_loader import Numbers, endless
from opensora_like.datasets.loader import make_loader
multiprocessing.set_start_method("forkserver")  # as Python 3.14 does by itself
start()
stop = StopSignal()
stream = make_loader(Numbers(), endless(), num_workers=2, prefetch_factor=int(sys.argv[1]))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
print(*(batch.index for batch in itertools.islice(stream, 9)), stop.received, flush=True)
"""


@pytest.fixture
def reading(request: pytest.FixtureRequest) -> subprocess.Popen:
    """A process at the beginning of a stream, the leader of a group. Args: param: micro-batches that are read ahead."""
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(getattr(request, "param", 1))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield started
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(started.pid, signal.SIGKILL)
    started.communicate()


def test_a_process_ends_with_its_readers(reading: subprocess.Popen) -> None:
    """Though nobody closed the stream: multiprocessing tells the readers to end, once, and waits for them."""
    reading.stdout.readline()
    told, errors = reading.communicate("\\n", timeout=120)
    assert reading.returncode == 0 and not errors, errors
    assert told.split() == [*"012012012", "None"]


def test_readers_go_on_when_the_group_is_told_to_stop(reading: subprocess.Popen) -> None:
    """However often, and as soon as they are there; what they were asked to read comes, and then all of them end."""
    readers = reading.stdout.readline().split()
    assert len(readers) == 2
    for _ in range(3):
        os.killpg(reading.pid, signal.SIGTERM)
    told, errors = reading.communicate("\\n", timeout=120)
    assert reading.returncode == 0 and not errors, errors
    assert told.split() == [*"012012012", str(int(signal.SIGTERM))]
    assert not [pid for pid in readers if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("reading", [3000], indirect=True)
def test_readers_of_a_killed_process_end(reading: subprocess.Popen) -> None:
    """Though what they have read fills a pipe that nobody empties; SIGTERM of others is nothing to them."""
    reading.stdout.readline()
    reading.kill()
    reading.communicate(timeout=120)  # its output ends with the last process that has it
