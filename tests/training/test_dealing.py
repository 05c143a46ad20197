"""Ranks of a sequence group deal the reading: each clip is decoded once, and the run stays what it is, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.training.harness import metrics_of

CASES = Path(__file__).parents[1] / "distributed/dealing_cases.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the runs of the script."""
    folder = tmp_path_factory.mktemp("dealing")
    done = subprocess.run([sys.executable, CASES, folder], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def reads(folder: Path) -> list[Counter]:
    """How often each rank read an (epoch, row)."""
    return [Counter(file.read_text().splitlines()) for file in sorted(folder.glob("reads.*"))]


@pytest.mark.parametrize(
    ("dealt", "whole"), [("dealt", "whole"), ("dealt by workers", "whole"), ("dealt with bad", "whole with bad")]
)
def test_the_run_stays_what_it_is(runs: Path, dealt: str, whole: str) -> None:
    """Losses, gradient norms and samples are bitwise those of ranks that read everything, and so are the bad rows."""
    found = metrics_of(runs / dealt)
    assert len(found) == 8 and found == metrics_of(runs / whole)
    bad = [sorted((runs / name / "bad_samples.jsonl").open()) for name in (dealt, whole) if "bad" in name]
    assert not bad or (bad[0] == bad[1] and len(bad[0]) > 4)


def test_every_clip_is_decoded_once(runs: Path) -> None:
    """By one of the two ranks, about as many by each; without dealing by both."""
    mine, whole = reads(runs / "dealt"), reads(runs / "whole")
    assert whole[0] == whole[1] and mine[0] + mine[1] == whole[0]
    assert not mine[0].keys() & mine[1].keys()
    assert abs(mine[0].total() - mine[1].total()) <= 0.2 * whole[0].total()
    both = zip(*(json.loads((runs / "dealt" / f"places.{rank}").read_text()) for rank in (0, 1)), strict=True)
    assert all(len(a + b) == len({*a, *b}) for a, b in both)


def test_a_bad_clip_is_looked_at_once_and_so_is_its_spare(runs: Path) -> None:
    """The rank of the place reads what replaces it."""
    mine, whole = reads(runs / "dealt with bad"), reads(runs / "whole with bad")
    assert mine[0] + mine[1] == whole[0] == whole[1]


def test_all_ranks_hear_that_no_spare_is_left(runs: Path) -> None:
    """With the files of all of them."""
    said = [(runs / "no spare" / f"error.{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "no spare is left" in said[0] and ".mp4" in said[0]
