"""Launchers: plain python, and `colossalai run` with a hostfile, as the documents print it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.training.harness import CONFIG, ROOT, metrics_of


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_colossalai_run_with_a_hostfile(tmp_path: Path) -> None:
    """Two processes on this machine, started by ColossalAI's launcher."""
    (tmp_path / "hostfiles").write_text("127.0.0.1\n")
    command = ["colossalai", "run", "--hostfile", str(tmp_path / "hostfiles"), "--nproc_per_node", "2"]
    command += ["--master_port", "29517", "scripts/diffusion/train.py", str(CONFIG), "--outputs", str(tmp_path)]
    command += ["--steps", "3", "--booster.type", "colossalai", "--wandb", "False"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert "127.0.0.1: success" in done.stdout, done.stdout[-2000:]
    assert metrics_of(tmp_path / "toy", "step") == [(1,), (2,), (3,)]


def test_plain_python_is_one_process(tmp_path: Path) -> None:
    """Without a launcher there is a group of one; ColossalAI works there, too."""
    command = [sys.executable, "scripts/diffusion/train.py", str(CONFIG), "--outputs", str(tmp_path), "--steps", "2"]
    command += ["--booster.type", "colossalai"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "toy")) == 2
