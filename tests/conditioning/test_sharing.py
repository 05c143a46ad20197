"""Ranks with the same batches each encode a part of the samples and have all of them afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.conditioning.sharing import Sharing

CASES = Path(__file__).parents[1] / "distributed/sharing_cases.py"


def test_every_rank_has_all_and_encodes_its_part(tmp_path: Path) -> None:
    """The same inputs as one rank makes, up to rounding; bit-equal on all ranks; B / n samples encoded by each."""
    done = subprocess.run([sys.executable, CASES, tmp_path], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(ranks) == 3
    for size, encoded in ((1, 1), (2, 1), (3, 1), (5, 2)):
        found = [rank[str(size)] for rank in ranks]
        assert all(f[0] < 1e-5 and f[1] == encoded for f in found), (size, found)
        assert len({f[2] for f in found}) == 1


@pytest.mark.parametrize(("size", "wanted"), [(1, [0]), (4, [1, 3])])
def test_what_is_over_repeats_the_last(size: int, wanted: list[int]) -> None:
    """All ranks make equally many."""
    sharing = object.__new__(Sharing)
    sharing._rank, sharing._size = 1, 3
    assert sharing.own(size) == wanted
