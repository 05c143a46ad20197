"""Notices gradient norms far above those before, which clipping hides and which often come from a broken clip."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

WINDOW = 100  # updates that say what is usual
LEAST = 20  # updates before anything is judged


class SpikeGuard:
    """Compares each gradient norm with the median of those before.

    Args:
        factor: times the median from which on a norm is a spike; 0 never.

    Raises:
        ValueError: a factor between 0 and 1, or a negative one.
    """

    def __init__(self, factor: float) -> None:
        if factor and factor <= 1:
            raise ValueError(f"spike_factor={factor} must be above 1, or 0 to report no spikes")
        self._factor = factor
        self._norms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def usual(self, grad_norm: float, role: str = "") -> float | None:
        """The usual norm of `role` where `grad_norm`, the same on all ranks, is a spike; else None."""
        norms = self._norms[role]
        usual = statistics.median(norms) if len(norms) >= LEAST else None
        norms.append(grad_norm)
        return usual if usual is not None and self._factor and grad_norm > self._factor * usual else None
