"""Looking on: a run that validates and samples is the run that does not, and its numbers survive any kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.held_out import MeasuredLosses, held_out_rows
from opensora_like.datasets.table import Table
from opensora_like.publish import DRAFT
from opensora_like.training.build import build_run
from opensora_like.training.data import build_dataset
from opensora_like.training.trainer import Run, train
from opensora_like.training.validation import Watched, weights_in_place
from tests.training.harness import CONFIG, Killed, assert_same, metrics_of, tensors_of, train_toy

STEPS = 12
OTHER_CLIPS = "{'every': 4, 'dataset': {'num_clips': 24}, 'num_clips': 9, 'num_bins': 3}"
SHARE = "{'every': 4, 'share': 0.3, 'num_clips': 9, 'num_bins': 3}"
SAMPLING = ["--sample-every", "3", "--sampling", "{'prompts': ['a']}"]


class Recorder:
    """An observer that keeps what it is told, and draws random numbers where it samples."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.seen: list[MeasuredLosses] = []
        self.sampled: list[tuple[int, str, float]] = []
        self.reported: list[int] = []
        self.resumed: list[tuple[int, bool]] = []

    def resume(self, step: int, *, is_new: bool) -> None:
        self.resumed.append((step, is_new))

    def measured(self, seen: MeasuredLosses) -> dict[str, float]:
        self.seen.append(seen)
        return {f"val_loss_{seen.weights}": float(seen.losses_NK.mean())}

    def sample(self, step: int, weights: str) -> None:
        assert not self.watched.forward.training and not torch.is_grad_enabled()
        torch.rand(7)
        master = next(iter(self.watched.booster.master_shards()))[1]
        self.sampled.append((step, weights, float(master.double().sum())))

    def report(self, step: int) -> None:
        self.reported.append(step)


def build(outputs: Path, *arguments: str, keep: list[Recorder] | None = None) -> Run:
    config = read_config(CONFIG, ["--outputs", str(outputs), "--steps", str(STEPS), *arguments]).config

    def observe(watched: Watched) -> Recorder:
        recorder = Recorder(watched)
        if keep is not None:
            keep.append(recorder)
        return recorder

    return build_run(config, rt.start(), config_name=str(CONFIG), observe=observe)


def watch(outputs: Path, *arguments: str) -> tuple[Run, Recorder]:
    """Train to the end. Returns: the run and what was seen of it."""
    keep: list[Recorder] = []
    run = build(outputs, *arguments, keep=keep)
    train(run)
    return run, keep[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Recorder, Path]:
    """A run that validates on another table, samples, and has an EMA."""
    outputs = tmp_path_factory.mktemp("watched")
    return *watch(outputs, "--validation", OTHER_CLIPS, *SAMPLING), outputs


def training_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("lora", [[], ["--lora-config", "{'r': 2, 'target_modules': ['qkv'], 'lora_dropout': 0.5}"]])
def test_a_run_that_is_looked_at_is_the_run_that_is_not(tmp_path: Path, lora: list[str]) -> None:
    """Losses, weights, moments, EMA and position, bit for bit; with dropout as well, which draws from torch itself."""
    plain = train_toy(tmp_path / "plain", "--steps", str(STEPS), *lora)
    run, recorder = watch(tmp_path / "watched", "--validation", OTHER_CLIPS, *SAMPLING, *lora)
    assert recorder.seen and recorder.sampled
    assert_same(run, plain)
    rows = training_rows(tmp_path / "watched/toy")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in rows] == metrics_of(
        tmp_path / "plain/toy", "step", "loss", "grad_norm"
    )
    assert all(module.training for module in recorder.watched.forward.modules())


def test_what_is_due_is_done_at_its_step(watched: tuple[Run, Recorder, Path]) -> None:
    """The beginning and the end, and every so many updates; raw and EMA; numbers go to the metric writers."""
    _, recorder, outputs = watched
    assert [(s.step, s.weights) for s in recorder.seen] == [
        (0, "base"), (4, "raw"), (4, "ema"), (8, "raw"), (8, "ema"), (12, "raw"), (12, "ema"),
    ]  # fmt: skip
    assert [s[:2] for s in recorder.sampled] == [(0, "raw"), (3, "ema"), (6, "ema"), (9, "ema"), (12, "ema")]
    assert recorder.reported == [0, 3, 4, 6, 8, 9, 12] and recorder.resumed == [(-1, True)]
    rows = [json.loads(line) for line in (outputs / "toy/metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in validated] == [0, 4, 8, 12] and "val_loss_ema" in validated[1]
    last = recorder.seen[-1]
    assert last.losses_NK.shape == last.base_NK.shape == (9, 3) and len(last.buckets) == 9
    assert np.isfinite(last.losses_NK).all() and last.edges == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert np.array_equal(np.load(outputs / "toy/validation/step00000012-ema.npy"), last.losses_NK)


def test_the_numbers_depend_on_weights_alone(watched: tuple[Run, Recorder, Path], tmp_path: Path) -> None:
    """Another seed of the run and another order of its data: the same clips, noise and t, so equal weights of the
    beginning give equal losses."""
    _, recorder, _ = watched
    weights = ["--load", str(next((watched[2] / "toy").glob("epoch*"))), "--load-weights-only"]
    found = []
    for seed in ("1", "2"):
        keep: list[Recorder] = []
        run = build(tmp_path / seed, "--seed", seed, "--validation", OTHER_CLIPS, *weights, keep=keep)
        found.append(np.load(tmp_path / seed / "toy/validation/base.npy"))
        run.lock.close()
    assert np.array_equal(*found)
    assert np.array_equal(found[0], recorder.seen[-2].losses_NK), "the base of load_weights_only is what was loaded"


def test_the_ema_is_measured_and_the_weights_come_back(watched: tuple[Run, Recorder, Path]) -> None:
    """Within, the masters are the shards given; after it, all that a checkpoint holds is as it was."""
    run, recorder, _ = watched
    before = tensors_of(run)
    with weights_in_place(run.booster, run.ema.shards):
        for name, master in run.booster.master_shards():
            assert torch.equal(master, run.ema.shards[name])
    after = tensors_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    raw, ema = recorder.seen[-2:]
    assert not np.array_equal(raw.losses_NK, ema.losses_NK)


class KillAt:
    """Stands for a kill just before the watch looks at a step, after its checkpoint."""

    def __init__(self, inner: Callable[..., None], step: int) -> None:
        self.inner, self.step = inner, step

    def __call__(self, step: int, writers: list, *, is_last: bool) -> None:
        if step == self.step:
            raise Killed
        self.inner(step, writers, is_last=is_last)


@pytest.mark.parametrize("kill", [4, 6, 12])
def test_a_kill_leaves_no_gap(watched: tuple[Run, Recorder, Path], tmp_path: Path, kill: int) -> None:
    """Killed between a checkpoint and what was due after it: the resumed run makes up for it, with the same numbers."""
    options = ["--validation", OTHER_CLIPS, *SAMPLING, "--ckpt-every", "2"]
    keep: list[Recorder] = []
    run = build(tmp_path, *options, keep=keep)
    run.watch.after_step = KillAt(run.watch.after_step, kill)
    with pytest.raises(Killed):
        train(run)
    again, second = watch(tmp_path, *options, "--load", "latest")
    assert_same(again, watched[0])
    assert second.resumed[0][1] is False, "the base of the first start is kept"
    seen = {(s.step, s.weights): s.losses_NK for s in [*keep[0].seen, *second.seen]}
    assert len(seen) == len(keep[0].seen) + len(second.seen), "nothing is measured twice"
    assert seen.keys() == {(s.step, s.weights) for s in watched[1].seen}
    for whole in watched[1].seen:
        assert np.array_equal(seen[whole.step, whole.weights], whole.losses_NK)
    assert [*keep[0].sampled, *second.sampled] == watched[1].sampled


def test_what_was_measured_is_said_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of clips.json would be in the way of every later start: it has its name once it is on disk."""
    fsync, synced = os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()) or fsync(file)
    )
    build(tmp_path, "--validation", OTHER_CLIPS)
    names = {file.name for file in synced if file.parent.name == "validation"}
    assert f"{DRAFT}clips.json" in names and "clips.json" not in names


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    """A share of the table: training sees none of these rows, validation no others; a changed share stops a resume."""
    keep: list[Recorder] = []
    run = build(tmp_path, "--validation", SHARE, "--steps", "30", "--ckpt-every", "10", keep=keep)
    seen: set[int] = set()

    def on_batch(batch: Batch) -> None:
        seen.update(batch.rows)

    run.on_batch = on_batch
    train(run)
    held_out = set(np.flatnonzero(held_out_rows(toy_table(), 0.3)).tolist())
    measured = set(json.loads((tmp_path / "toy/validation/clips.json").read_text())["rows"])
    assert len(seen) > 20 and not seen & held_out and measured <= held_out and measured
    with pytest.raises(ValueError, match="table: "):
        build(tmp_path, "--validation", SHARE.replace("0.3", "0.2"), "--load", "latest")
    with pytest.raises(ValueError, match="held-out rows"):
        build(tmp_path, "--load", "latest")


def toy_table() -> Table:
    """All of the training table."""
    return build_dataset(read_config(CONFIG).config, multiple=2).table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation", "{'every': 4}"], "give one of them"),
        (["--validation", "{'every': 4, 'share': 0.1, 'dataset': {}}"], "give one of them"),
        (["--validation", "{'evry': 4, 'share': 0.1}"], "validation.evry: .*every"),
        (["--validation", "{'every': 4, 'share': 0.9}"], "at most 0.5"),
        (["--validation", "{'every': 0, 'share': 0.1}"], "validation.every=0"),
        (["--validation", "{'every': 1, 'dataset': {'num_clip': 3}}"], "dataset.num_clip.*num_clips"),
        (["--sampling", "{'prompts': ['a']}"], "set it, or remove sampling"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Before anything is trained, with the section's own name."""
    with pytest.raises(ValueError, match=message):
        build(tmp_path, *arguments)


def test_without_an_observer_it_is_an_error(tmp_path: Path) -> None:
    """A setting is never ignored."""
    with pytest.raises(ValueError, match="need an observer"):
        train_toy(tmp_path, "--validation", SHARE)
