"""What a run takes of a checkpoint when it is not to go on with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.checkpoint import layout
from opensora_like.training import build
from tests.training.harness import build_toy, tensors_of, train_toy


def test_weights_only_begins_anew(tmp_path: Path) -> None:
    """Weights are the checkpoint's; step, data, moments and EMA are those of a run that begins."""
    first = train_toy(tmp_path, "--steps", "3")
    source = layout.complete_checkpoints(tmp_path / "toy")[-1]
    run = build_toy(tmp_path, "--load", str(source), "--load-weights-only", "--exp-name", "b")
    assert (run.state.step, run.state.epoch, run.state.micro_batch) == (0, 0, 0)
    mine, theirs = tensors_of(run), tensors_of(first)
    for name, tensor in mine.items():
        kind, key = name.split("/", 1)
        expected = theirs[f"master/{key}"] if kind in ("master", "ema") else torch.zeros_like(tensor)
        assert torch.equal(tensor, expected), name
    run.lock.close()


def test_a_partial_load_says_which_keys(tmp_path: Path) -> None:
    """Into a deeper model: refused as it stands; with load_strict=False every key that stays is in the log."""
    train_toy(tmp_path, "--steps", "1")
    source = layout.complete_checkpoints(tmp_path / "toy")[-1]
    deeper = ["--model.depth", "2", "--load", str(source), "--load-weights-only"]
    with pytest.raises(ValueError, match="load_strict=False"):
        build_toy(tmp_path, *deeper, "--exp-name", "b")
    run = build_toy(tmp_path, *deeper, "--load-strict", "False", "--exp-name", "c")
    log = (tmp_path / "c/log.txt").read_text()
    missing = [name for name, _ in run.booster.master_shards() if ".1." in name and name.startswith("double_blocks")]
    assert missing and all(f"missing, keeps its initial value: {name}\n" in log for name in missing)
    run.lock.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load-weights-only"], "give --load as well"),
        (["--load", "latest", "--load-strict", "False"], "give --load-weights-only as well"),
        (["--load", "latest", "--load-weights-only", "--start-step", "3"], "remove start_epoch and start_step"),
        (["--start-step", "0"], "move the data of a loaded checkpoint; give --load as well"),
        (["--load", "absent"], "load='absent' is not a folder"),
        (["--load", "absent/epoch*-global_step*"], "matches no complete checkpoint"),
        (["--load", "latest"], "has no complete checkpoint; start without --load"),
        (["--steps", "0"], "steps=0 must be 1 or more"),
        (["--epochs", "-1"], "epochs=-1 must be 1 or more"),
    ],
)
def test_mistakes_are_errors_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Each says what is missing, too much, or not there."""
    for name in ("build_unfilled", "build_model", "build_frozen"):
        monkeypatch.setattr(build, name, None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_toy(tmp_path, *arguments)
