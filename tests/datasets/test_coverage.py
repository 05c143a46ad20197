"""The buckets that a row may come to are those that it does come to in some epoch, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from opensora_like.datasets.bucket import assign, compile_buckets
from opensora_like.datasets.coverage import rows_of_buckets
from opensora_like.datasets.table import table_of

CONFIGS = [
    {"256px": {9: (1.0, 2), 1: (1.0, 2)}},
    {
        "256px": {33: ((0.7, 0.4), 2), 17: (0.5, 2), 9: ((1.0, 0.5), 2), 1: (0.5, 2)},
        "128px": {17: (0.5, 2), 1: (1.0, 2)},
    },
    {"256px": {33: ((1.0, 1.0), 2), 9: (0.0, 2)}, "128px_ar1:1": {9: (1.0, 2)}},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_reachable_buckets_are_those_of_many_epochs(config: dict) -> None:
    """Skips, keeps and smaller resolutions, for random clips and images over 60 epochs."""
    draw = np.random.default_rng(0)
    count = 40
    columns = {
        "num_frames": np.where(draw.random(count) < 0.3, 1, draw.integers(1, 50, count)),
        "height": draw.integers(60, 400, count),
        "width": draw.integers(60, 400, count),
        "fps": np.full(count, 24.0),
    }
    table = table_of({"path": [f"{i}.mp4" for i in range(count)], "text": ["a"] * count, **columns})
    buckets = compile_buckets(config, multiple=16)
    seen: dict[int, set[int]] = {}
    for epoch in range(60):
        ids = assign(*columns.values(), buckets, fps_max=24.0, seed=1, epoch=epoch)
        for row in np.flatnonzero(ids >= 0):
            seen.setdefault(int(ids[row]), set()).add(int(row))
    found = {bucket: set(rows.tolist()) for bucket, rows in rows_of_buckets(table, buckets, fps_max=24.0).items()}
    assert found == seen
