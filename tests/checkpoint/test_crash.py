"""Saves that are killed: whatever is visible is whole, and the next start goes on from the newest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.checkpoint import layout

ROOT = Path(__file__).parents[2]
VISIBLE = ("renamed", "published", "linked", "removed")  # from here on step 2 is complete


def run(*command: str) -> str:
    """Run a script of this repository to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `crash_save` found: two processes, killed once at every stage of every rank."""
    folder = tmp_path_factory.mktemp("crash")
    run("tests/distributed/crash_save.py", str(folder))
    return json.loads((folder / "facts.json").read_text())


def test_every_stage_was_killed(facts: dict) -> None:
    """The stages are those that a save without kill reports; each was the last thing that its rank did."""
    expected = ["begin", "copied", "written", "state", "checksums", *VISIBLE]
    assert [s for s in facts["stages"]["0"] if not s.startswith("file")] == expected
    killed = {(c["stage"], c["victim"]) for c in facts["crashes"]}
    assert killed >= {(stage, int(rank)) for rank, stages in facts["stages"].items() for stage in stages}
    for crash in facts["crashes"]:
        codes = crash["codes"]
        assert codes[crash["victim"]] == -9
        other = codes[1 - crash["victim"]]
        assert other == -9 if crash["everyone"] else other > 0, "the survivor must end, and not with success"


def test_what_is_visible_is_whole(facts: dict) -> None:
    """Step 1 stays until step 2 is complete, and step 2 is visible from its rename on and not before."""
    for crash in facts["crashes"]:
        assert not crash["damaged"], crash
        if crash["again"]:
            assert crash["visible"] == ([] if crash["stage"] == "aside" else [2]), crash
        elif crash["stage"] == "removed":
            assert crash["visible"] == [2], crash
        else:
            assert crash["visible"] == ([1, 2] if crash["stage"] in VISIBLE else [1]), crash


def test_the_next_start_goes_on(facts: dict) -> None:
    """It loads every number of the newest complete step, clears what was left, and saves."""
    for crash in facts["crashes"]:
        assert crash["after"] == [0, 0] and not crash["left"] and crash["final"] == [3], crash
        assert crash["linked"] == layout.checkpoint_name(0, 3), crash


def test_random_kills_change_nothing(tmp_path: Path) -> None:
    """Three random SIGKILLs of a live run of two ranks: nothing complete is lost, the end is the same in every bit."""
    printed = run("tools/kill_storm.py", str(tmp_path), "--kills", "3", "--steps", "24")
    assert "kills 3 runs" in printed and "problems 0" in printed, printed
