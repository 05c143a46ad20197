"""A T5 encoder cut over two processes encodes as the whole one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.harness import metrics_of, train_toy

SCRIPT = Path(__file__).parents[1] / "distributed" / "text_encoder_cases.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text_tp")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What both ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    command.append(str(folder))
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


@pytest.mark.parametrize("layout", ["hybrid", "fsdp2"])
def test_a_run_cuts_its_encoder_where_its_config_says_so(output: str, layout: str, folder: Path, tmp_path) -> None:
    """``encoders.text.tp=True`` under torchrun: each rank has half of the blocks, embeddings are those of the whole
    encoder, and the run has the losses of one process."""
    assert output.count(f"{layout}: same, smaller") == 2
    train_toy(tmp_path, "--steps=3")
    columns = ("step", "loss", "grad_norm")
    found, expected = metrics_of(folder / layout / "toy", *columns), metrics_of(tmp_path / "toy", *columns)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_run_without_tensor_parallelism_refuses_to_cut(output: str) -> None:
    """The error names the key and the booster."""
    assert output.count("fsdp2 alone: encoders.text.tp=True needs tensor parallelism") == 2
