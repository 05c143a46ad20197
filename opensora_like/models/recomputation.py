"""Which blocks of a denoiser with two kinds of blocks recompute their activations in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence


def recomputed_counts(settings: Sequence[int] | bool | None, every: tuple[int, int], *, where: str) -> tuple[int, int]:
    """How many of each kind, from the first.

    Args:
        settings: (a, b): a two-stream and b one-stream blocks; True: all; False, None: none.
        every: how many there are.
        where: the setting, for the error.

    Raises:
        ValueError: not two counts of at least 0.
    """
    if settings is None or isinstance(settings, bool):
        return every if settings else (0, 0)
    counts = tuple(settings) if isinstance(settings, Sequence) else (settings,)
    if len(counts) != 2 or any(not isinstance(n, int) or n < 0 for n in counts):
        raise ValueError(f"{where}={settings!r} must be two counts >= 0 (two-stream, one-stream blocks), True or False")
    return counts
