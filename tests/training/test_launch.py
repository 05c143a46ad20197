"""Launchers: plain python, and `colossalai run` with a hostfile, as the documents print it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.harness import CONFIG, ROOT, metrics_of


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("hosts", "per_host"), [(["127.0.0.1"], 2), (["127.0.0.1", "localhost"], 1)])
def test_colossalai_run_with_a_hostfile(tmp_path: Path, hosts: list[str], per_host: int) -> None:
    """Two processes on this machine, started by ColossalAI's launcher: of one host, and of two that are the same."""
    (tmp_path / "hostfiles").write_text("".join(f"{host}\n" for host in hosts))
    command = ["colossalai", "run", "--hostfile", str(tmp_path / "hostfiles"), "--nproc_per_node", str(per_host)]
    command += ["--master_port", "29517", "scripts/diffusion/train.py", str(CONFIG), "--outputs", str(tmp_path)]
    command += ["--steps", "3", "--booster.type", "colossalai", "--wandb", "False"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert all(f"{host}: success" in done.stdout for host in hosts), done.stdout[-2000:]
    assert "world_size 2" in (tmp_path / "toy/log.txt").read_text()
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
