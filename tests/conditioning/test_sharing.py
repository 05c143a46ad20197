"""Ranks with the same batches each encode a part of the samples and have all of them afterwards."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.conditioning.sharing import Sharing

CASES = Path(__file__).parents[1] / "distributed/sharing_cases.py"


def test_every_rank_has_all_and_encodes_its_part(tmp_path: Path) -> None:
    """The same inputs as one rank makes of all pixels, up to rounding; bit-equal on all ranks; each has the pixels of
    its own samples and encodes B / n, given frames and grey clips included."""
    done = subprocess.run([sys.executable, CASES, tmp_path], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(ranks) == 3
    for case, encoded in (
        ("build 1", 1),
        ("build 2", 1),
        ("build 3", 1),
        ("build 5", 2),
        ("build_wan 1", 1),
        ("build_wan 5", 2),
    ):
        found = [rank[case] for rank in ranks]
        assert all(f[0] < 1e-5 and f[1] == encoded for f in found), (case, found)
        assert len({f[2] for f in found}) == 1


def sharing_of(rank: int, size: int, *, dp_size: int = 1) -> Sharing:
    sharing = object.__new__(Sharing)
    sharing.rank, sharing._size, sharing._dp_size = rank, size, dp_size
    return sharing


@pytest.mark.parametrize(("size", "wanted"), [(1, [0]), (4, [1, 3])])
def test_what_is_over_repeats_the_last(size: int, wanted: list[int]) -> None:
    """All ranks make equally many."""
    assert sharing_of(1, 3).own(size, index=0) == wanted


@pytest.mark.parametrize(("size", "dp_size"), [(2, 1), (3, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_turns_are_fair(size: int, dp_size: int, num_samples: int) -> None:
    """Every sample has one reader; all read equally many, and so does each of a rank's loader workers, which take
    turns as well."""
    ranks = [sharing_of(rank, size, dp_size=dp_size) for rank in range(size)]
    work = {}
    for turn in range(2000):
        index = turn * dp_size + dp_size - 1
        places = [sharing.places(num_samples, index) for sharing in ranks]
        assert sorted(itertools.chain(*places)) == list(range(num_samples))
        for rank, own in enumerate(places):
            for num_workers in (2, 3, 4):
                key = (num_workers, rank, turn % num_workers)
                work[key] = work.get(key, 0) + len(own)
    for (num_workers, _, _), count in work.items():
        assert count == pytest.approx(2000 * num_samples / size / num_workers, rel=0.1)
    assert len(work) == size * (2 + 3 + 4)
