"""What a table of held-out losses says: means with confidence intervals, per noise level and bucket, and in pairs.

Clips are what is drawn at random, so they are what intervals are over: the noise levels of one clip are averaged
before they count, because they rise and fall together. A pair is one clip, one noise and one t under two sets of
weights; what the clip itself makes easy or hard is the same on both sides and leaves the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
MANY = 1000  # degrees of freedom from which Student's distribution is taken for the normal one


class Interval(NamedTuple):
    """A mean and the range that covers the true one with probability `CONFIDENCE`; not numbers where num is below 2."""

    mean: float
    low: float
    high: float
    num: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval is below or above 0, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


@dataclass(frozen=True)
class LossSummary:
    """Intervals of a table of losses, or of differences of losses.

    Args:
        overall: over clips, of each clip's mean over the noise levels.
        by_t: one per noise level.
        by_bucket: bucket name -> over its clips, in the order in which buckets first appear.
    """

    overall: Interval
    by_t: tuple[Interval, ...]
    by_bucket: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is no finite number is None."""
        return {
            "overall": _plain(self.overall),
            "by_t": [_plain(interval) for interval in self.by_t],
            "by_bucket": {name: _plain(interval) for name, interval in self.by_bucket.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LossSummary:
        """The inverse of `to_json`, but for None, which becomes NaN."""
        by_bucket = {name: _interval_of(v) for name, v in values["by_bucket"].items()}
        return cls(_interval_of(values["overall"]), tuple(map(_interval_of, values["by_t"])), by_bucket)


def summarize(losses_NK: np.ndarray, buckets: Sequence[str]) -> LossSummary:
    """Means with intervals.

    Args:
        losses_NK: of N clips at K noise levels.
        buckets: of each clip.

    Raises:
        ValueError: not one bucket per clip, or no clip.
    """
    losses_NK = _checked(losses_NK, buckets)
    per_clip = losses_NK.mean(axis=1)
    names = np.array(buckets)
    return LossSummary(
        overall=mean_interval(per_clip),
        by_t=tuple(mean_interval(column) for column in losses_NK.T),
        by_bucket={name: mean_interval(per_clip[names == name]) for name in dict.fromkeys(buckets)},
    )


def summarize_pairs(losses_NK: np.ndarray, base_NK: np.ndarray, buckets: Sequence[str]) -> LossSummary:
    """The same of the differences of paired losses; below 0 is better than the base.

    Args:
        losses_NK, base_NK: of the same clips, noise and t.

    Raises:
        ValueError: tables of different shape, or as `summarize`.
    """
    if np.shape(losses_NK) != np.shape(base_NK):
        raise ValueError(
            f"losses of shape {np.shape(losses_NK)} cannot be paired with a base of shape {np.shape(base_NK)}; "
            "measure both on the same clips and noise levels"
        )
    return summarize(np.asarray(losses_NK, np.float64) - np.asarray(base_NK, np.float64), buckets)


def mean_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Mean of independent values and Student's interval of it.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("the mean of 0 values has no interval; measure at least one clip")
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    half = student_quantile(confidence, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def student_quantile(confidence: float, degrees: int) -> float:
    """The t that a Student variable of so many degrees of freedom stays within, on both sides, with `confidence`.

    Raises:
        ValueError: a confidence outside (0, 1), or less than one degree of freedom.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(f"confidence={confidence!r} must be within 0 and 1, and degrees={degrees!r} 1 or more")
    if degrees >= MANY:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(\\|T\\| <= t). Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, exact for whole degrees."""
    angle = math.atan2(t, math.sqrt(degrees))
    is_odd = degrees % 2
    term = total = math.cos(angle) if is_odd else 1.0
    for i in range(2 + is_odd, degrees - 1, 2):
        term *= (i - 1) / i * math.cos(angle) ** 2
        total += term
    if not is_odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def _checked(losses_NK: np.ndarray, buckets: Sequence[str]) -> np.ndarray:
    losses_NK = np.asarray(losses_NK, np.float64)
    if losses_NK.ndim != 2 or len(losses_NK) != len(buckets) or not losses_NK.size:
        raise ValueError(
            f"losses of shape {losses_NK.shape} with {len(buckets)} bucket names; give [clips, noise levels] with one "
            "name per clip, and at least one clip"
        )
    return losses_NK


def _plain(interval: Interval) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in interval._asdict().items()}


def _interval_of(values: Mapping[str, Any]) -> Interval:
    return Interval(**{k: math.nan if v is None else v for k, v in values.items()})
