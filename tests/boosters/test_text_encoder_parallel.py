"""A T5 encoder cut over two processes encodes as the whole one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "distributed" / "text_encoder_cases.py"


@pytest.fixture(scope="module")
def output() -> str:
    """What both ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["gated t5", "relu t5", "gated umt5", "encoder"])
def test_cut_equals_whole(output: str, kind: str) -> None:
    """Gated and plain MLPs, T5's shared and umT5's own position tables; with padding hidden and not."""
    assert output.count(f"{kind}: same, smaller") == 2


def test_heads_that_do_not_divide_are_refused(output: str) -> None:
    """With both numbers."""
    assert output.count("tp_size=2 does not divide the 3 heads") == 2
