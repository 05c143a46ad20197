"""Real runs under torchrun feed their models the same in the same steps, on 1 and 2 processes, after any kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.checkpoint import layout
from opensora_like.config import read_config
from opensora_like.datasets.plan import steps_in_epoch
from tests.training.harness import CONFIG, ROOT
from tests.training.toy_videos import ToyVideos

MICRO, EPOCHS = 4, 3
LOADERS = [["--num-workers", str(n), "--prefetch-factor", str(p)] for n, p in ((0, 2), (1, 1), (3, 4), (1, 4), (3, 1))]
TO_THE_END = ["--epochs", str(EPOCHS)]


def launch(num_processes: int, folder: Path, runs: list[dict]) -> None:
    """Make these runs, one after the other, under one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(ROOT / "tests/distributed/elastic_order_cases.py"), str(folder), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def a_run(name: str, load: Path | None, *arguments: str) -> dict:
    return {"name": name, "load": None if load is None else str(load), "arguments": list(arguments)}


def checkpoints_of(folder: Path, name: str) -> dict[int, Path]:
    return {layout.step_of(found): found for found in layout.complete_checkpoints(folder / name)}


def fed(folder: Path, name: str) -> dict[str, list]:
    return json.loads((folder / f"{name}.json").read_text())["steps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on two processes; then, on one and on two, a run from the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("elastic")
    launch(2, folder, [a_run("whole", None, *TO_THE_END)])
    saved = checkpoints_of(folder, "whole")
    last = max(saved)
    # as after a kill behind each step; one step more of each, the first to the end
    one = [
        a_run(f"one-{step}", path, *LOADERS[step % 5], "--steps", str(last if step == 1 else step + 1))
        for step, path in saved.items()
        if step < last
    ]
    launch(1, folder, [a_run("alone", None, "--steps", "3"), *one])
    # worlds 2, 1, 2: from what one process saved three steps after it had taken over from two
    back = checkpoints_of(folder, "one-1")[4]
    two = [a_run(f"two-{s}", p, *LOADERS[s % 5], "--steps", str(s + 1)) for s, p in saved.items() if s % 2 and s < last]
    launch(2, folder, [a_run("back", back, *LOADERS[2], *TO_THE_END), *two])
    return folder


def test_a_run_has_the_steps_that_its_epochs_have_when_they_begin(folder: Path) -> None:
    """With a keep probability of 0.5 epochs differ in length, and the run ends with the last whole step of the last."""
    cfg = read_config(CONFIG, []).config
    data = ToyVideos(bucket_config=cfg.bucket_config, multiple=2, seed=cfg.seed)
    lengths = [len(data.plan(epoch)) for epoch in range(EPOCHS)]
    assert len(set(lengths)) > 1
    whole = json.loads((folder / "whole.json").read_text())
    assert whole["end"] == sum(steps_in_epoch(length, MICRO) for length in lengths)
    seen = [micro[:2] for step in whole["steps"].values() for micro in step]
    used = [steps_in_epoch(length, MICRO) * MICRO for length in lengths]
    assert seen == [[epoch, index] for epoch in range(EPOCHS) for index in range(used[epoch])]


def test_every_step_is_fed_the_same_after_a_kill_behind_any_step(folder: Path) -> None:
    """Rows, frames, noise, times, tasks and dropped captions, on 1 and 2 processes, with 0, 1 and 3 loader workers."""
    whole = fed(folder, "whole")
    assert len({json.dumps(step) for step in whole.values()}) == len(whole) >= 7
    assert fed(folder, "alone") == {step: whole[step] for step in ("1", "2", "3")}
    for world, every in (("one", 1), ("two", 2)):
        for step in range(1, len(whole), every):
            mine = fed(folder, f"{world}-{step}")
            assert str(step + 1) in mine
            assert mine == {number: whole[number] for number in mine}, (world, step)
    assert fed(folder, "one-1") == {number: whole[number] for number in whole if number != "1"}


def test_a_world_that_changes_twice(folder: Path) -> None:
    """Two processes, then one, then two again, over the ends of epochs."""
    whole = fed(folder, "whole")
    assert fed(folder, "back") == {number: whole[number] for number in whole if int(number) > 4}
