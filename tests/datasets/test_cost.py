"""Ranks of a step cost the same, in an order that depends neither on them nor on what micro-batches cost in seconds."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

from opensora_like.datasets.balance import Balance, balance_plan, balanced_order, micro_batch_weight, utilisation
from opensora_like.datasets.bucket import BucketShape, compile_buckets
from opensora_like.datasets.cost import CostModel, Grid, Measured, calibrate, tokens_of
from opensora_like.datasets.plan import EpochPlan, Position, build_plan, rank_stream, steps_in_epoch
from opensora_like.datasets.table import table_of

CONFIGS = Path(__file__).parents[2] / "configs/_base_"
# FLOPs of the 11B MMDiT with 512 text tokens, forward and backward, in TFLOP
MMDIT = CostModel(per_token=0.05188, per_token_pair=2.666e-6, per_sample=25.93)


def _published(name):
    return compile_buckets(Config.fromfile(str(CONFIGS / f"buckets_{name}.py"))["bucket_config"], multiple=16)


def _uniform_lengths(buckets, num, seed=0):
    """A plan in random order in which every number of frames of a resolution has equally many clips, all 16:9."""
    wide = np.array([ratio == "16:9" for ratio in buckets.ratios])
    share = np.where(wide, 1 / buckets.batch_sizes, 0.0)
    ids = np.random.default_rng(seed).choice(len(buckets), num, p=share / share.sum()).astype(np.int32)
    return EpochPlan(0, buckets, np.arange(1), np.arange(1), np.arange(num), ids, "plan")


@pytest.mark.parametrize(
    ("name", "unbalanced"), [("stage1", 0.83), ("stage2", 0.53), ("stage2_i2v", 0.71)], ids=lambda v: str(v)
)
def test_ranks_are_busy_on_the_published_buckets(name, unbalanced):
    """Utilisation rises from 0.83, 0.53 and 0.71 at 8 ranks to 0.97 and more at 2 to 64, with accumulation as well."""
    buckets = _published(name)
    costs = MMDIT.of_buckets(buckets, Grid())
    plan = _uniform_lengths(buckets, 20_000)
    assert utilisation(plan, costs, world_size=8) == pytest.approx(unbalanced, abs=0.01)
    balanced = balance_plan(plan, Balance(costs), seed=1)
    for world_size in (2, 8, 16, 32, 64):
        assert utilisation(balanced, costs, world_size=world_size) >= 0.97, world_size
    assert utilisation(balanced, costs, world_size=8, accumulation=8) >= 0.97
    assert utilisation(balanced, costs, world_size=48) > utilisation(plan, costs, world_size=48)


def test_balancing_only_reorders():
    """Every micro-batch once; a start that is a multiple of K keeps its steps; epoch and seed shuffle the groups."""
    plan = _uniform_lengths(_published("stage2"), 10_007)
    balance = Balance(MMDIT.of_buckets(plan.buckets, Grid()), window=1024, group=64)
    orders = [balance_plan(plan, balance, seed=seed) for seed in (1, 1, 2)]
    for made in orders:
        np.testing.assert_array_equal(np.sort(made.starts), plan.starts)
        np.testing.assert_array_equal(made.bucket_ids, plan.bucket_ids[made.starts])
    np.testing.assert_array_equal(orders[0].starts, orders[1].starts)
    assert (orders[0].starts != orders[2].starts).mean() > 0.9
    for window in range(0, 9216, 1024):
        assert set(orders[0].starts[window : window + 1024]) == set(range(window, window + 1024))
    small = _uniform_lengths(plan.buckets, 41)
    assert sorted(balance_plan(small, balance, seed=1).starts) == list(range(41))


def test_only_the_order_of_costs_counts():
    """Costs in TFLOP, seconds or any rising function of them give one order and one fingerprint."""
    plan = _uniform_lengths(_published("stage1"), 5000)
    costs = MMDIT.of_buckets(plan.buckets, Grid())
    made = [balance_plan(plan, Balance(c), seed=1) for c in (costs, 3e-3 * costs, costs**2)]
    assert len({m.fingerprint for m in made}) == 1 and len({m.starts.tobytes() for m in made}) == 1
    assert balance_plan(plan, Balance(-costs), seed=1).fingerprint != made[0].fingerprint
    assert balance_plan(plan, Balance(costs, window=2048), seed=1).fingerprint != made[0].fingerprint


def test_the_mix_does_not_drift():
    """At every tenth of an epoch each bucket has had its share within 4 sigma, and the dropped tail is of no kind."""
    plan = _uniform_lengths(_published("stage2"), 41_000)
    costs = MMDIT.of_buckets(plan.buckets, Grid())
    shares = np.bincount(plan.bucket_ids, minlength=len(costs)) / len(plan)
    dropped, epochs = np.zeros(len(costs)), 60
    for epoch in range(epochs):
        random = np.random.default_rng(epoch).permutation(plan.bucket_ids)[: 5000 - epoch]
        order = balanced_order(np.unique(costs, return_inverse=True)[1][random], Balance(costs), seed=0, epoch=epoch)
        tail = (5000 - epoch) % 64
        dropped += np.bincount(random[order[-tail:]], minlength=len(costs)) if tail else 0
    kinds = shares > 0.01
    sigma = np.sqrt(dropped.sum() * shares * (1 - shares))
    assert (np.abs(dropped - dropped.sum() * shares) < 4 * sigma + 1)[kinds].all()
    balanced = balance_plan(plan, Balance(costs), seed=1)
    for done in range(4100, 41_000, 4100):
        seen = np.bincount(balanced.bucket_ids[:done], minlength=len(costs))
        # beyond chance, what is cut out of a window is of one kind: up to a few groups of it
        assert (np.abs(seen - done * shares) < 4 * np.sqrt(done * shares * (1 - shares)) + 64 * 4).all(), done


CLIPS = {"num_frames": [1, 40, 90], "sides": [256, 512]}
CONFIG = {"256px": {1: (1.0, 5), 33: (1.0, 3), 65: (1.0, 2)}, "512px": {1: (0.5, 2), 33: (0.5, 1)}}


def _plans(num_rows=2000):
    rng = np.random.default_rng(0)
    frames = rng.choice([1, 40, 90], num_rows)
    columns = {"path": [f"{i}.mp4" for i in range(num_rows)], "text": ["x"] * num_rows, "num_frames": frames}
    columns |= {name: rng.choice([256, 512], num_rows) for name in ("height", "width")}
    table = table_of(columns | {"fps": np.where(frames == 1, math.nan, 24.0)})
    buckets = compile_buckets(CONFIG, multiple=16)
    balance = Balance(MMDIT.of_buckets(buckets, Grid()), window=128, group=16)

    def plan_of(epoch):
        return balance_plan(build_plan(table, buckets, fps_max=24, seed=3, epoch=epoch), balance, seed=3)

    return [plan_of(epoch) for epoch in range(3)]


PLANS = _plans()


def _stream(world, accumulation, position, num_steps):
    streams = [
        rank_stream(PLANS.__getitem__, position, dp_rank=rank, dp_size=world, accumulation=accumulation)
        for rank in range(world)
    ]
    steps = [[next(stream) for stream in streams for _ in range(accumulation)] for _ in range(num_steps)]
    return [sorted((b.epoch, b.index, *b.rows.tolist()) for b in step) for step in steps]


def test_balanced_steps_are_the_same_on_any_world():
    """1, 2, 4 and 8 ranks with one K of micro-batches per step: one hash of (step -> samples), over an epoch's end."""
    num_steps = steps_in_epoch(len(PLANS[0]), 8) + 5
    hashes = {
        hashlib.blake2b(json.dumps(_stream(world, 8 // world, Position(0, 0), num_steps)).encode()).hexdigest()
        for world in (1, 2, 4, 8)
    }
    assert len(hashes) == 1


def test_another_step_size_continues_the_stream():
    """From a position on, 5 ranks take the same micro-batches as 8 would, without a repeat or a gap."""
    before = [b for step in _stream(8, 1, Position(0, 0), 7) for b in step]
    after = [b for step in _stream(5, 1, Position(0, 56), 12) for b in step]
    assert [index for _, index, *_ in before + after] == list(range(56 + 60))


def test_no_clip_is_starved():
    """Clips of buckets smaller than a batch are seen as often as the others over many epochs, in whole batches."""
    sides = {"height": [256] * 41, "width": [256] * 38 + [512] * 2 + [454], "fps": [24.0] * 41, "text": ["x"] * 41}
    table = table_of({"path": [str(i) for i in range(41)], "num_frames": [33] * 41, **sides})
    buckets = compile_buckets({"256px": {33: (1.0, 6)}}, multiple=16)
    seen = np.zeros(41)
    for epoch in range(600):
        plan = build_plan(table, buckets, fps_max=24, seed=3, epoch=epoch)
        for i in range(len(plan)):
            np.add.at(seen, plan[i].rows, 1)
            assert len(plan[i].rows) == 6
    assert np.allclose(seen[:38], 600 * 36 / 38, rtol=0.05)
    assert np.allclose(seen[38:], 600, rtol=0.25), seen[38:]


def test_cost_is_what_it_says():
    """Tokens of images, 4k+1 and 4k frames; the sum of the terms; coefficients that cannot be."""
    grid = Grid(4, 16)
    image, clip = BucketShape("256px", 1, 192, 336), BucketShape("256px", 33, 192, 336)
    assert [grid.tokens(s) for s in (image, clip)] == [252, 9 * 252]
    assert Grid(4, 32).tokens(BucketShape("768px", 128, 576, 1024)) == 32 * 18 * 32
    cost = CostModel(per_token=2.0, per_token_pair=0.5, per_sample=3.0, per_pixel=1e-3, per_micro_batch=7.0)
    expected = 4 * (3 + 2 * 2268 + 0.5 * 2268**2 + 1e-3 * 33 * 192 * 336) + 7
    assert cost.of([clip], [4], grid)[0] == pytest.approx(expected)
    for wrong in ({"per_token": -1.0}, {"per_token": math.nan}, {"per_token": 0.0}):
        with pytest.raises(ValueError, match=r"cost.*(per_token=|every coefficient is 0)"):
            CostModel(**wrong)
    for window, group in ((100, 64), (32, 64), (64, 0)):
        with pytest.raises(ValueError, match="must be a multiple of"):
            Balance(np.ones(3), window=window, group=group)


def test_calibration_finds_the_coefficients():
    """From exact seconds every bucket is predicted exactly; from noisy ones within the noise, never below 0."""
    buckets = _published("stage2")
    true = CostModel(per_token=1e-4, per_token_pair=4e-9, per_sample=0.02, per_pixel=3e-9, per_micro_batch=0.3)
    seconds = true.of_buckets(buckets, Grid())
    rows = [
        Measured.of({**shape._asdict(), "batch_size": int(batch), "seconds": float(s)})
        for shape, batch, s in zip(buckets.shapes, buckets.batch_sizes, seconds, strict=True)
    ]
    exact = calibrate(rows, Grid())
    np.testing.assert_allclose(exact.model.of_buckets(buckets, Grid()), seconds, rtol=1e-6)
    assert exact.worst_error < 1e-6
    rng = np.random.default_rng(0)
    noisy = calibrate([r._replace(seconds=r.seconds * rng.normal(1, 0.05)) for r in rows], Grid())
    np.testing.assert_allclose(noisy.model.of_buckets(buckets, Grid()), seconds, rtol=0.06)
    assert 0.02 < noisy.mean_error < 0.06
    with pytest.raises(ValueError, match="3 or more different sizes, got 1 in 5"):
        calibrate(rows[:1] * 5, Grid())
    with pytest.raises(ValueError, match="seconds=None must be a number above 0"):
        Measured.of({"num_frames": 1, "height": 1, "width": 1, "batch_size": 1})


def test_loss_weights_count_samples_or_tokens():
    """The weighted mean of a step's losses is the mean over micro-batches, samples or tokens; weights average 1."""
    plan = PLANS[1]
    tokens = tokens_of(plan.buckets, Grid())
    ids = plan.bucket_ids[16:24]
    counts = plan.buckets.batch_sizes[ids]
    losses = np.random.default_rng(0).random(8)
    expected = {
        "per_micro_batch": losses.mean(),
        "per_sample": (losses * counts).sum() / counts.sum(),
        "per_token": (losses * counts * tokens[ids]).sum() / (counts * tokens[ids]).sum(),
    }
    for mode, mean in expected.items():
        weight = micro_batch_weight(plan, Position(1, 16), 8, mode, tokens=tokens)
        assert weight.mean() == pytest.approx(1.0)
        assert (weight * losses).mean() == pytest.approx(mean)
    for position, mode, given, message in (
        (Position(0, 0), "per_sample", tokens, "is not in the plan of epoch 1"),
        (Position(1, len(plan) - 7), "per_sample", tokens, "is not in the plan"),
        (Position(1, 0), "per_clip", tokens, "loss_weight='per_clip' is not one of"),
        (Position(1, 0), "per_token", None, "needs the tokens of each bucket"),
    ):
        with pytest.raises(ValueError, match=message):
            micro_batch_weight(plan, position, 8, mode, tokens=given)


def test_published_bucket_fragments_compile():
    """Each fragment sets bucket_config alone, and has the published number of buckets."""
    for name, count in {"image": 41, "stage1": 393, "stage2": 847, "stage2_i2v": 858, "high_compression": None}.items():
        settings = Config.fromfile(str(CONFIGS / f"buckets_{name}.py"))
        assert list(settings) == ["bucket_config"]
        buckets = compile_buckets(settings["bucket_config"], multiple=32 if count is None else 16)
        if count is not None:
            assert len(buckets) == count
