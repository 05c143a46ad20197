"""The order of the data depends on seed, epoch and table, and on nothing that a kill or a cluster can change."""

import hashlib
import json
import math

import numpy as np
import pytest

from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.plan import (
    MAX_SPARES,
    Position,
    advance,
    build_plan,
    order_key,
    rank_stream,
    steps_in_epoch,
    what_changed,
)
from opensora_like.datasets.table import table_of

CONFIG = {"256px": {1: (0.7, 5), 33: (0.8, 3), 65: ((1.0, 0.3), 2)}, "512px": {33: (0.5, 2)}}
BUCKETS = compile_buckets(CONFIG, multiple=16)


def _table(num_rows=300, seed=0):
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 40, 90], num_rows)
    return table_of(
        {
            "path": [f"{i}.mp4" for i in range(num_rows)],
            "text": ["a clip"] * num_rows,
            "num_frames": frames,
            "height": rng.choice([256, 512], num_rows),
            "width": rng.choice([256, 512], num_rows),
            "fps": np.where(frames == 1, math.nan, 24.0),
        }
    )


def _square_clips(num_rows, num_frames=33):
    same = {"height": 256, "width": 256, "fps": 24.0, "text": "a clip", "num_frames": num_frames}
    return table_of({"path": [f"{i}.mp4" for i in range(num_rows)], **{k: [v] * num_rows for k, v in same.items()}})


TABLE = _table()


def _plan(epoch, table=TABLE, buckets=BUCKETS, **options):
    return build_plan(table, buckets, **{"fps_max": 24, "seed": 3, "epoch": epoch} | options)


PLANS = [_plan(epoch) for epoch in range(4)]


def _steps(world, position, num_steps, per_step=4):
    """What `world` ranks together read in each step: (epoch, index, rows) of every micro-batch, ranks in order."""
    accumulation = per_step // world
    streams = [
        rank_stream(PLANS.__getitem__, position, dp_rank=r, dp_size=world, accumulation=accumulation)
        for r in range(world)
    ]
    steps = []
    for _ in range(num_steps):
        batches = [next(stream) for stream in streams for _ in range(accumulation)]
        steps.append(sorted((b.epoch, b.index, *sorted(b.rows.tolist())) for b in batches))
    return steps


def _hash(steps):
    return [hashlib.blake2b(json.dumps(step).encode()).hexdigest() for step in steps]


def test_steps_are_the_same_on_any_world_and_after_any_resume():
    """hash(step -> rows) is equal for 1, 2 and 4 ranks, and from every position of two epochs, boundaries included."""
    num_steps = sum(steps_in_epoch(len(plan), 4) for plan in PLANS[:2]) + 3
    whole = _hash(_steps(1, Position(0, 0), num_steps))
    assert len(set(whole)) == num_steps
    assert _hash(_steps(2, Position(0, 0), num_steps)) == whole
    assert _hash(_steps(4, Position(0, 0), num_steps)) == whole
    position = Position(0, 0)
    for done in range(num_steps):
        assert _hash(_steps((1, 2, 4)[done % 3], position, num_steps - done)) == whole[done:]
        position = advance(position, len(PLANS[position.epoch]), 4)


def test_rounds_and_ranks_deal_a_step_in_order():
    """Round m, rank r takes micro-batch p + m * dp_size + r; ranks never share a sample within an epoch."""
    streams = [rank_stream(PLANS.__getitem__, Position(1, 3), dp_rank=r, dp_size=2, accumulation=3) for r in range(2)]
    dealt = [[next(stream).index for _ in range(6)] for stream in streams]
    assert dealt == [[3, 5, 7, 9, 11, 13], [4, 6, 8, 10, 12, 14]]
    rows = [row for plan in PLANS[1:2] for i in range(len(plan)) for row in plan[i].rows.tolist()]
    assert len(rows) == len(set(rows))


def test_an_epoch_covers_all_but_less_than_a_batch_per_bucket():
    """Every row with a bucket is planned once, in a batch of its own shape, save a tail shorter than a batch."""
    for plan in PLANS:
        used = np.concatenate([plan[i].rows for i in range(len(plan))])
        assert len(np.unique(used)) == len(used) and np.isin(used, plan.rows).all()
        counts = np.diff(plan.bounds)
        assert len(used) == (counts - counts % BUCKETS.batch_sizes).sum()
        for i in range(len(plan)):
            batch = plan[i]
            assert len(batch.rows) == BUCKETS.batch_sizes[plan.bucket_ids[i]]
            assert (TABLE.num_frames[batch.rows] >= batch.shape.num_frames).all()
            assert batch.shape == BUCKETS.shapes[plan.bucket_ids[i]]


def test_every_clip_is_seen_in_a_few_epochs():
    """200 clips in batches of 12 over 20 epochs: all are seen; the published sampler never sees 92 of such."""
    table, buckets = _square_clips(200), compile_buckets({"256px": {33: (1.0, 12)}}, multiple=16)
    plans = [_plan(epoch, table, buckets) for epoch in range(20)]
    seen = {row for plan in plans for i in range(len(plan)) for row in plan[i].rows.tolist()}
    assert all(len(plan) == 16 for plan in plans) and seen == set(range(200))


def test_spares_are_other_rows_of_the_same_bucket():
    """Spares are the rows that follow in the bucket's order, wrapping round, tail included, never the batch's own."""
    table, buckets = _square_clips(29), compile_buckets({"256px": {33: (1.0, 12)}}, multiple=16)
    plan = _plan(0, table, buckets)
    assert len(plan) == 2
    for i in range(2):
        start = int(plan.starts[i])
        ring = np.roll(plan.rows, -start)
        np.testing.assert_array_equal(plan[i].rows, ring[:12])
        np.testing.assert_array_equal(plan[i].spares, ring[12 : 12 + MAX_SPARES])
    exact = _plan(0, _square_clips(12), buckets)
    assert len(exact[0].spares) == 0
    almost = _plan(0, _square_clips(14), buckets)[0]
    assert len(almost.spares) == 2 and not set(almost.spares) & set(almost.rows)


def test_steps_per_epoch_are_exact_each_epoch():
    """With probabilities below 1 the plans differ in length, and each epoch yields just the steps it has."""
    assert len({len(plan) for plan in PLANS}) > 1
    stream = rank_stream(PLANS.__getitem__, Position(0, 0), dp_rank=1, dp_size=2, accumulation=2)
    for epoch, plan in enumerate(PLANS[:3]):
        steps = steps_in_epoch(len(plan), 4)
        assert steps == len(plan) // 4
        assert [next(stream).epoch for _ in range(2 * steps)] == [epoch] * 2 * steps
    assert next(stream).epoch == 3


def test_position_moves_to_the_next_epoch_when_no_step_is_left():
    """advance counts micro-batches and never stops where fewer than a step remain; nor does a stream begin there."""
    assert advance(Position(0, 0), 11, 4) == (0, 4)
    assert advance(Position(0, 4), 11, 4) == (1, 0)
    assert advance(Position(0, 4), 12, 4) == (0, 8)
    assert steps_in_epoch(11, 4, start=4) == 1 and steps_in_epoch(11, 4, start=8) == 0
    end = Position(0, len(PLANS[0]))
    first = next(rank_stream(PLANS.__getitem__, end, dp_rank=0, dp_size=2, accumulation=2))
    assert (first.epoch, first.index) == (1, 0)


def test_same_inputs_same_plan_and_each_input_counts():
    """Plans repeat themselves; epoch, seed and shuffle change the order; without shuffle the table's order stays."""

    def order(plan):
        return plan.rows.tolist(), plan.starts.tolist(), plan.bucket_ids.tolist()

    assert order(_plan(1)) == order(PLANS[1])
    assert order(_plan(1)) != order(PLANS[2])
    assert order(_plan(1, seed=4)) != order(PLANS[1])
    plain = _plan(0, shuffle=False)
    assert (np.diff(plain.starts) > 0).all()
    assert all((np.diff(plain[i].rows) > 0).all() for i in range(len(plain)))


def test_a_plan_keeps_to_the_table_order_of_other_numpy_versions():
    """The first rows of a fixed plan, as recorded when it was written: a change here breaks every resume."""
    plan = build_plan(
        _square_clips(10), compile_buckets({"256px": {33: (1.0, 3)}}, multiple=16), fps_max=24, seed=42, epoch=7
    )
    assert [plan[i].rows.tolist() for i in range(3)] == [[0, 6, 9], [7, 4, 1], [3, 2, 8]]
    large, single = _square_clips(20_000), compile_buckets({"256px": {33: (1.0, 1)}}, multiple=16)  # by bijections
    plan = build_plan(large, single, fps_max=24, seed=42, epoch=7)
    assert [plan[i].rows.tolist() for i in (0, 1, 19_999)] == [[294], [16243], [18052]]
    assert sorted(plan[i].rows[0] for i in range(20_000)) == list(range(20_000))


def test_changes_between_two_runs_are_named():
    """Each part of the order key changes the fingerprint and has a phrase; a trip through json changes nothing."""
    key = order_key(TABLE, BUCKETS, fps_max=24, seed=3)
    assert PLANS[0].fingerprint == key["fingerprint"]
    assert what_changed(json.loads(json.dumps(key)), order_key(_table(), BUCKETS, fps_max=24.0, seed=3)) == []
    other = {**CONFIG, "256px": {1: (0.7, 6), 33: (0.8, 3), 97: (1.0, 2)}}
    changed = order_key(_table(299), compile_buckets(other, multiple=32), fps_max=None, seed=4, shuffle=False)
    assert what_changed(key, changed) == [
        "table: 300 rows of '<memory>' -> 299 rows of '<memory>'",
        "multiple: 16 -> 32",
        "fps_max: 24.0 -> None",
        "seed: 3 -> 4",
        "shuffle: True -> False",
        "bucket_config.256px.65: probability 1.0 (skip 0.3), batch size 2 -> absent",
        "bucket_config.256px.1: probability 0.7 (skip 0.0), batch size 5 -> probability 0.7 (skip 0.0), batch size 6",
        "bucket_config.256px.97: absent -> probability 1.0 (skip 0.0), batch size 2",
    ]
    before = {k: v for k, v in key.items() if k != "version"} | {"fingerprint": "of version 1"}
    assert what_changed(before, key) == ["version of the order: 1 -> 2, which lays the same epochs out otherwise"]
    edited = order_key(_table(seed=1), BUCKETS, fps_max=24, seed=3)
    assert what_changed(key, edited) == ["table: 300 rows of '<memory>' were edited or reordered"]


def test_an_empty_plan_says_what_to_lower():
    """No full batch: the error names per bucket clips and batch size, then why the other clips have no bucket."""
    numbers = {"num_frames": [129, 129, 200, 40, 1], "height": [256] * 5, "width": [256] * 5, "fps": [24.0] * 5}
    table = table_of({"path": list("abcde"), "text": ["x"] * 5, **numbers})
    with pytest.raises(ValueError) as caught:
        _plan(0, table, compile_buckets({"256px": {129: (1.0, 12)}}, multiple=16))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the plan of epoch 0 has 0 micro-batches: of 5 clips in '<memory>', 3 have a bucket")
    assert lines[1] == "bucket 256px/129 has 3 clips of ratio 1:1 but its batch size is 12: lower it to 3"
    assert lines[2].startswith("without a bucket, too_few_frames: 1 clip: too few frames; none has the 129 that bucket")
    assert lines[2].endswith("the longest has 40: use a bucket of 40 frames or fewer")
    assert lines[3].startswith("without a bucket, no_image_bucket: 1 clip: single frames")


def test_streams_that_cannot_run_say_so():
    """A step larger than an epoch, a position behind the end, and ranks that cannot be are ValueErrors."""
    with pytest.raises(ValueError, match=r"epoch 0 has \d+ micro-batches and one step takes 4000 \(dp_size 4 \* accu"):
        next(rank_stream(PLANS.__getitem__, Position(0, 0), dp_rank=0, dp_size=4, accumulation=1000))
    with pytest.raises(ValueError, match="behind the end of epoch 0"):
        next(rank_stream(PLANS.__getitem__, Position(0, 1000), dp_rank=0, dp_size=1, accumulation=1))
    for rank, size, accumulation in ((2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match=r"dp_rank=|must be 1 or more"):
            rank_stream(PLANS.__getitem__, Position(0, 0), dp_rank=rank, dp_size=size, accumulation=accumulation)
    with pytest.raises(IndexError, match="which has"):
        PLANS[0][len(PLANS[0])]
