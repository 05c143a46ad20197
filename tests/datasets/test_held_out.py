"""Which rows are held out, what training's table is without them, and which clips are measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.held_out import choose_clips, held_out_rows, table_without
from opensora_like.datasets.plan import build_plan, order_key
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table, table_of

BUCKETS = compile_buckets({"8px_ar1:1": {1: (1.0, 3), 5: (1.0, 2), 9: ((1.0, 0.5), 4)}}, multiple=2)


def table_named(names: list[str]) -> Table:
    """Images and videos by turns."""
    numbers = {name: [8] * len(names) for name in ("height", "width", "fps")}
    return table_of(
        {"path": names, "text": names, "num_frames": [1 + 8 * (n % 2) for n in range(len(names))], **numbers}
    )


NAMES = [f"clips/{i}.mp4" for i in range(2000)]


def sharded(folder: Path) -> ShardedTable:
    """The same table in shards."""
    table = table_named(NAMES)
    columns = {name: getattr(table, name) for name in ("num_frames", "height", "width", "fps")}
    pq.write_table(pa.table({"path": NAMES, "text": NAMES, **columns}), folder / "table.parquet")
    return write_shards(folder / "table.parquet", num_shards=3)


def dataset(table: Table) -> SimpleNamespace:
    return SimpleNamespace(table=table, buckets=BUCKETS, fps_max=24.0)


def test_the_share_is_a_rule_about_paths() -> None:
    """About as many as asked for; a row stays in or out when others come or the order changes; a larger share holds
    out the same ones and more; rows of one file stay together."""
    rows = held_out_rows(table_named(NAMES), 0.1)
    assert 160 < rows.sum() < 240
    turned = held_out_rows(table_named([*NAMES[::-1], "more.mp4"]), 0.1)
    assert np.array_equal(turned[: len(NAMES)][::-1], rows)
    assert (held_out_rows(table_named(NAMES), 0.2) >= rows).all()
    twice = held_out_rows(table_named([*NAMES, *NAMES]), 0.1)
    assert np.array_equal(twice[: len(NAMES)], twice[len(NAMES) :])


def test_training_sees_the_others_under_their_numbers() -> None:
    """No plan has a held-out row, all the others keep their numbers and facts, and the order has another key."""
    table = table_named(NAMES)
    rows = held_out_rows(table, 0.1)
    without = table_without(table, rows)
    seen: set[int] = set()
    for epoch in range(4):
        plan = build_plan(without, BUCKETS, fps_max=24.0, seed=1, epoch=epoch)
        for number in range(len(plan)):
            seen |= {*plan[number].rows.tolist(), *plan[number].spares.tolist()}
    others = set(np.flatnonzero(~rows).tolist())
    assert seen == others
    assert without.row(7) == table.row(7) or rows[7]
    keys = [order_key(t, BUCKETS, fps_max=24.0, seed=1)["fingerprint"] for t in (table, without)]
    assert keys[0] != keys[1]
    assert table_without(table, held_out_rows(table, 0.2)).fingerprint != without.fingerprint


def test_clips_are_chosen_once_for_all() -> None:
    """So many, of the rows given, each in its bucket; micro-batches of one bucket; more clips include the fewer."""
    table = table_named(NAMES)
    rows = held_out_rows(table, 0.1)
    batches = choose_clips(dataset(table), rows, 50)
    chosen = np.concatenate([batch.rows for batch in batches])
    assert len(chosen) == len(set(chosen.tolist())) == 50 and rows[chosen].all()
    for number, batch in enumerate(batches):
        assert batch.index == number and batch.epoch == 0 and not len(batch.spares)
        assert (np.minimum(table.num_frames[batch.rows], 9) >= batch.shape.num_frames).all()
    shapes = {batch.shape.num_frames for batch in batches}
    assert shapes == {1, 5, 9}, "the draws of training are made once"
    again = choose_clips(dataset(table), rows, 50)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(batches, again, strict=True))
    more = np.concatenate([batch.rows for batch in choose_clips(dataset(table), rows, 80)])
    assert set(chosen.tolist()) < set(more.tolist())
    everything = choose_clips(dataset(table), None, 10**6)
    assert sum(len(batch.rows) for batch in everything) == 2000


def test_what_cannot_be_held_out_is_an_error(tmp_path: Path) -> None:
    """A share out of range, one that takes no row, a table in shards, clips without a bucket."""
    table = table_named(NAMES)
    for share in (0, 0.6, -1):
        with pytest.raises(ValueError, match=f"validation.share={share}"):
            held_out_rows(table, share)
    with pytest.raises(ValueError, match="holds out 0 of the 3 rows"):
        held_out_rows(table_named(NAMES[:3]), 0.001)
    with pytest.raises(ValueError, match=r"validation\.dataset\.data_path"):
        held_out_rows(sharded(tmp_path), 0.1)
    only_large = compile_buckets({"64px": {1: (1.0, 1)}}, multiple=2)
    with pytest.raises(ValueError, match="none of the 2000 held-out clips"):
        choose_clips(SimpleNamespace(table=table, buckets=only_large, fps_max=24.0), None, 4)
