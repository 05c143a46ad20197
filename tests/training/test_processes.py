"""Real processes: two ranks under torchrun, killed, told to stop, resumed on another number of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from tests.training.harness import metrics_of, torchrun

STEPS = 30
COLOSSALAI = ["--booster", "{'type': 'colossalai', 'plugin': 'zero2'}"]


def arguments(outputs: Path, *more: str) -> list[str]:
    return ["--outputs", str(outputs), "--steps", str(STEPS), "--ckpt-every", "3", *COLOSSALAI, *more]


def final_tensors(outputs: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, whole."""
    folder = layout.complete_checkpoints(outputs / "toy")[-1]
    assert layout.step_of(folder) == STEPS
    reader = PieceReader(folder)
    return {f"{kind}/{name}": reader.read_whole(kind, name) for kind in reader.kinds() for name in reader.names(kind)}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], atol: float) -> None:
    assert mine.keys() == theirs.keys()
    worst = max((mine[n] - theirs[n]).abs().max().item() for n in mine)
    assert worst <= atol


def wait_for_step(folder: Path, step: int, process) -> None:
    """Until the metrics have reached `step`."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on two ranks."""
    outputs = tmp_path_factory.mktemp("whole")
    done = torchrun(2, *arguments(outputs))
    assert done.returncode == 0, done.output
    return outputs


def test_kill_nine_and_resume(whole: Path, tmp_path: Path) -> None:
    """SIGKILL of all ranks while checkpoints are written in the background; resumed, it ends bit for bit the same."""
    process = torchrun(2, *arguments(tmp_path, "--async-io"), wait=False)
    wait_for_step(tmp_path / "toy", 7, process)
    os.system(f"pkill -KILL -P {process.pid}")
    process.kill()
    process.communicate()
    again = torchrun(2, *arguments(tmp_path, "--async-io", "--load", "latest"))
    assert again.returncode == 0, again.output
    assert_close(final_tensors(tmp_path), final_tensors(whole), 0.0)
    assert metrics_of(tmp_path / "toy") == metrics_of(whole / "toy")


def test_sigterm_to_one_rank_stops_all_and_saves(whole: Path, tmp_path: Path) -> None:
    """One rank is told; both save the same step and end with a code that means again; other worlds go on from it."""
    # saved at each step, it takes a while until the last one, however late this process is told of the fourth
    process = torchrun(2, *arguments(tmp_path, "--ckpt-every", "1"), wait=False)
    wait_for_step(tmp_path / "toy", 1, process)
    children = [int(pid) for pid in os.popen(f"pgrep -P {process.pid}").read().split()]
    wait_for_step(tmp_path / "toy", 4, process)
    os.kill(children[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    saved = layout.complete_checkpoints(tmp_path / "toy")
    assert "exitcode  : 75" in output.replace("exitcode : 75", "exitcode  : 75"), output
    assert layout.step_of(saved[-1]) >= 4

    # the rest on one process with two micro-batches a step: the same samples, the same numbers up to rounding
    one = torchrun(1, *arguments(tmp_path, "--load", "latest", "--accumulation-steps", "2"))
    assert one.returncode == 0, one.output
    names = ("step", "lr", "epoch", "samples")
    assert metrics_of(tmp_path / "toy", *names) == metrics_of(whole / "toy", *names)
    losses = [torch.tensor(metrics_of(o / "toy", "loss", "grad_norm")) for o in (tmp_path, whole)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_sigterm_to_the_launcher_saves_first(tmp_path: Path) -> None:
    """torchrun hands it on to whole groups of processes, the readers of data among them: these go on until the ranks,
    which save what they have, need them no more."""
    process = torchrun(
        2, *arguments(tmp_path, "--num-workers", "2", "--ckpt-every", "0", "--steps", "3000"), wait=False
    )
    wait_for_step(tmp_path / "toy", 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "is killed by signal" not in output, output
    (saved,) = layout.complete_checkpoints(tmp_path / "toy")
    assert 4 <= layout.step_of(saved) < 3000
    assert metrics_of(tmp_path / "toy", "step")[-1] == (layout.step_of(saved),)
