"""Counter-based randomness: the same counters give the same numbers, others give independent ones."""

from __future__ import annotations

import numpy as np
import torch

from opensora_like import rng


def test_a_draw_depends_on_its_counters_alone() -> None:
    """Order, neighbours and subsets of the rows do not matter."""
    rows = np.array([5, 3, 10**12, 0, 3])
    drawn = rng.uniform(1, "drop", 2, rows)
    assert drawn[1] == drawn[4] and len(set(drawn)) == 4
    assert np.array_equal(rng.uniform(1, "drop", 2, rows[::-1]), drawn[::-1])
    assert np.array_equal(rng.uniform(1, "drop", 2, rows[:2]), drawn[:2])
    assert rng.seed_of(1, "a", 23) != rng.seed_of(1, "a", 2, 3) != rng.seed_of(12, "a", 3)
    one = torch.randn(4, generator=rng.generator(1, "noise", 0, 7))
    assert torch.equal(one, torch.randn(4, generator=rng.generator(1, "noise", 0, 7)))


def test_numbers_are_uniform_and_purposes_independent() -> None:
    """Moments, a histogram, and correlations between purposes, epochs, seeds and neighbouring rows."""
    rows = np.arange(200_000)
    base = rng.uniform(42, "a", 0, rows)
    assert base.min() >= 0 and base.max() < 1
    assert abs(base.mean() - 0.5) < 3e-3 and abs(base.var() - 1 / 12) < 1e-3
    counts = np.histogram(base, 50, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi-squared with 49 degrees of freedom
    for other in (
        rng.uniform(42, "b", 0, rows),
        rng.uniform(42, "a", 1, rows),
        rng.uniform(43, "a", 0, rows),
        rng.uniform(42, "a", 0, rows + 1),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.01


def test_a_bijection_is_a_random_permutation() -> None:
    """Every number comes once; places, neighbours, low bits and two keys are independent, by chi-squared; recorded."""
    for num in (1, 2, 3, 7, 1000):
        assert sorted(rng.bijection(np.arange(num), num, 5).tolist()) == list(range(num))
    assert rng.bijection(np.array([0, 1, 99_999]), 100_000, 42).tolist() == [71180, 50277, 49068]
    deviations = []
    for num in (16_385, 50_000, 65_536):
        one, other = (rng.bijection(np.arange(num), num, rng.seed_of(0, "a", key)) for key in (0, 1))
        place = np.arange(num)
        cells = [(place * 32 // num, one * 32 // num), (one * 32 // num, other * 32 // num), (place % 32, one % 32)]
        cells += [(one * 32 // num, np.roll(one, lag) * 32 // num) for lag in (1, 2, 4, 256, 4096)]
        for x, y in cells:
            counts = np.bincount(x * 32 + y, minlength=1024)
            chi = ((counts - num / 1024) ** 2 / (num / 1024)).sum()
            deviations.append((chi - 961) / np.sqrt(2 * 961))  # 31 * 31 degrees of freedom
    assert np.abs(deviations).max() < 4, deviations
