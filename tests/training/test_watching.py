"""What a run tells of its speed and of gradients that are out of the usual."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opensora_like.training.spikes import LEAST, SpikeGuard
from opensora_like.training.trainer import train
from tests.training.harness import build_toy, train_toy


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "toy/metrics.jsonl").read_text().splitlines()]


def test_tokens_operations_and_their_share_of_the_peak(tmp_path: Path) -> None:
    """Tokens are those of the batches; operations three times a counted forward; the peak divides them."""
    run = build_toy(tmp_path, "--steps", "3", "--peak-tflops", "2.0")
    counted = []
    inner = run.on_batch
    run.on_batch = lambda batch: (counted.append(run.throughput.of(batch)), inner(batch))
    train(run)
    for row, (tokens, flops) in zip(rows(tmp_path), counted, strict=True):
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(tokens, rel=1e-6)
        assert row["tflops"] * row["step_seconds"] == pytest.approx(flops / 1e12, rel=1e-6)
        assert row["mfu"] == pytest.approx(row["tflops"] / 2.0)
    weights = sum(p.numel() for p in run.step_fn.model.parameters() if p.ndim == 2)
    tokens, flops = counted[0]
    assert 0.3 < flops / (6 * weights * tokens) < 3  # the rule of thumb; text and attention make the rest


def test_without_a_peak_there_are_tokens_alone(tmp_path: Path) -> None:
    """Counting costs a start of the model on meta, so it is asked for."""
    train_toy(tmp_path, "--steps", "1")
    assert "mfu" not in rows(tmp_path)[0] and rows(tmp_path)[0]["tokens_per_second"] > 0
    with pytest.raises(ValueError, match=r"peak_tflops=-1.0 must be above 0"):
        build_toy(tmp_path / "b", "--steps", "1", "--peak-tflops", "-1")


def test_a_spike_is_reported_with_its_samples(tmp_path: Path) -> None:
    """A finite gradient far above the median names its rows and files; the run goes on."""
    run = build_toy(tmp_path, "--steps", str(LEAST + 2))
    inner, seen = run.step_fn, []

    def step_fn(batch):
        seen.append(batch)
        return inner(batch) * (1e4 if len(seen) == LEAST + 1 else 1.0)

    run.step_fn = step_fn
    assert train(run)
    told = [line for line in (tmp_path / "toy/log.txt").read_text().splitlines() if "times the usual" in line]
    assert len(told) == 1 and f"at step {LEAST + 1}" in told[0]
    assert str(seen[LEAST].rows) in told[0] and seen[LEAST].paths[0] in told[0]


def test_the_usual_is_a_median() -> None:
    """A few spikes do not make spikes usual; nothing is judged before enough was seen; 0 reports none."""
    guard, silent = SpikeGuard(10.0), SpikeGuard(0.0)
    norms = [1.0 + 0.01 * torch.rand(1).item() for _ in range(LEAST)]
    assert all(guard.usual(norm) is None for norm in [1e6, *norms])
    assert guard.usual(9.0) is None
    assert guard.usual(11.0) == pytest.approx(1.0, abs=0.02)
    assert all(silent.usual(norm) is None for norm in [*norms, 1e9])
    with pytest.raises(ValueError, match=r"spike_factor=0.5 must be above 1"):
        SpikeGuard(0.5)
