"""Means of held-out losses, and intervals that hold what they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from opensora_like.evaluation.paired_loss import (
    LossSummary,
    mean_interval,
    student_quantile,
    summarize,
    summarize_pairs,
)


def test_student_quantiles_are_those_of_the_tables() -> None:
    """Odd and even degrees of freedom, and many; to the digits printed in tables."""
    table = {1: 12.7062, 2: 4.30265, 5: 2.57058, 10: 2.22814, 29: 2.04523, 120: 1.97993, 10**6: 1.95997}
    for degrees, quantile in table.items():
        assert student_quantile(0.95, degrees) == pytest.approx(quantile, abs=1e-5)
    assert student_quantile(0.99, 7) == pytest.approx(3.49948, abs=1e-5)
    for wrong in ((0.0, 3), (1.0, 3), (0.95, 0)):
        with pytest.raises(ValueError, match="must be within"):
            student_quantile(*wrong)


@pytest.mark.parametrize("num", [3, 12])
def test_an_interval_covers_as_often_as_it_says(num: int) -> None:
    """Of 4000 samples from a known distribution, 95 % of the intervals hold its mean, within chance."""
    draws = np.random.default_rng(0).normal(2.0, 0.5, (4000, num))
    covered = np.mean([i.low <= 2.0 <= i.high for i in map(mean_interval, draws)])
    assert abs(covered - 0.95) < 0.012


def test_clips_are_what_is_drawn() -> None:
    """Noise levels of one clip rise and fall together: ten of them say no more about the mean than one."""
    per_clip = np.random.default_rng(1).normal(size=20)
    losses = np.repeat(per_clip[:, None], 10, axis=1)
    summary = summarize(losses, ["a"] * 20)
    assert summary.overall == pytest.approx(mean_interval(per_clip))
    assert summary.by_t == tuple([pytest.approx(summary.overall)] * 10)
    assert summary.by_bucket["a"] == pytest.approx(summary.overall)


def test_pairing_takes_away_what_the_clip_makes_hard() -> None:
    """A gain of 0.01 among clips that differ by 1: undecided without pairs, decided with them; and its sign."""
    rng = np.random.default_rng(2)
    base = rng.normal(3.0, 1.0, (40, 1)) + rng.normal(0, 0.01, (40, 4))
    better = base - 0.01 + rng.normal(0, 0.01, (40, 4))
    alone, start = summarize(better, ["a"] * 40).overall, summarize(base, ["a"] * 40).overall
    assert alone.low < start.mean < alone.high
    pair = summarize_pairs(better, base, ["a"] * 40)
    assert pair.overall.sign == -1 and pair.overall.mean == pytest.approx(alone.mean - start.mean)
    assert summarize_pairs(base, better, ["a"] * 40).overall.sign == 1
    assert summarize_pairs(base, base, ["a"] * 40).overall.sign == 0


def test_buckets_and_noise_levels_are_told_apart() -> None:
    """Each has its own clips and columns, in the order in which they appear."""
    losses = np.array([[1.0, 3.0], [2.0, 4.0], [10.0, 20.0]])
    summary = summarize(losses, ["small", "small", "large"])
    assert [i.mean for i in summary.by_t] == pytest.approx([13 / 3, 9.0])
    assert {name: (i.mean, i.num) for name, i in summary.by_bucket.items()} == {"small": (2.5, 2), "large": (15.0, 1)}
    assert list(summary.by_bucket) == ["small", "large"] and math.isnan(summary.by_bucket["large"].low)
    text = json.dumps(summary.to_json(), allow_nan=False)
    again = LossSummary.from_json(json.loads(text))
    assert again.by_t == summary.by_t and again.overall == summary.overall
    assert math.isnan(again.by_bucket["large"].high) and again.by_bucket["large"].sign == 0


def test_tables_that_do_not_fit_are_errors() -> None:
    """No clip, another number of buckets, another base."""
    with pytest.raises(ValueError, match="one name per clip"):
        summarize(np.zeros((2, 3)), ["a"])
    with pytest.raises(ValueError, match="at least one clip"):
        summarize(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot be paired with a base of shape \(2, 2\)"):
        summarize_pairs(np.zeros((2, 3)), np.zeros((2, 2)), ["a", "a"])
    with pytest.raises(ValueError, match="0 values"):
        mean_interval(np.zeros(0))
