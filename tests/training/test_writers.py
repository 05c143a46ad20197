"""Where metrics go: json lines always, tensorboard by default, wandb when asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.runtime import JsonlWriter
from tests.training.harness import build_toy, train_toy


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    """A kill after the checkpoint leaves rows, and perhaps half of one, that will be written again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writer = JsonlWriter(path, resume_step=2)
    writer.write(3, {"loss": float("nan"), "lr": 0.5})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "loss": "nan", "lr": 0.5}]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    """Events hold the loss of every logged step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_toy(tmp_path, "--steps", "4", "--tensorboard", "True", "--log-every", "2")
    events = EventAccumulator(str(tmp_path / "toy/tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "toy/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--wandb True writes an offline run into the run's folder, without an account."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_toy(tmp_path, "--steps", "2", "--wandb", "True")
    assert list((tmp_path / "toy/wandb").glob("offline-run-*/*.wandb"))


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and not there: the error says how to get it or do without."""
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or --wandb False"):
        build_toy(tmp_path, "--wandb")


def test_a_log_is_closed_by_the_next(tmp_path: Path) -> None:
    """Or every run of a process keeps a file open."""
    runtime = rt.Runtime(0, 1, 0, torch.device("cpu"))
    rt.set_up_logging(runtime, tmp_path / "a.txt")
    before = rt.logger.handlers[-1]
    rt.set_up_logging(runtime)
    assert isinstance(before, logging.FileHandler) and before.stream is None
