"""A run on a table in shards takes its plans from the index, balanced as asked for, and begins the next one ahead."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.balance import Balance
from opensora_like.datasets.plan import Position, rank_stream
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.video_text import VideoText
from opensora_like.training.data import make_plan_of
from tests.training.harness import CONFIG


def test_shards_and_table_make_the_same_steps(tmp_path: Path) -> None:
    """Over the end of an epoch; afterwards the plan of the epoch that comes is on disk."""
    draws = np.random.default_rng(0)
    columns = {"path": [f"{i}.mp4" for i in range(500)], "text": ["x"] * 500, "num_frames": draws.choice([1, 40], 500)}
    columns |= {"height": [256] * 500, "width": [256] * 500, "fps": [24.0] * 500}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    write_shards(tmp_path / "t.parquet", folder=tmp_path / "shards", num_shards=2)
    cfg, runtime = read_config(CONFIG, []).config, rt.start()
    rows, before = [], set(multiprocessing.active_children())
    for path in ("t.parquet", "shards"):
        buckets = {"256px": {1: (0.5, 5), 33: (1.0, 2)}}
        data = VideoText(str(tmp_path / path), bucket_config=buckets, multiple=16, seed=cfg.seed)
        balance = Balance(np.arange(len(data.buckets), dtype=float), window=16, group=8)
        plan_of = make_plan_of(cfg, runtime, data, balance)
        stream = rank_stream(plan_of, Position(0, 0), dp_rank=0, dp_size=2, accumulation=1)
        rows.append([next(stream).rows.tolist() for _ in range(len(plan_of(0)) // 2 + 10)])
    assert rows[0] == rows[1]
    for ahead in set(multiprocessing.active_children()) - before:
        ahead.join(timeout=120)
    epochs = sorted(int(folder.name.rsplit("-", 1)[1]) for folder in (tmp_path / "shards/index").glob("plan-*"))
    assert epochs == [1, 2]
