"""A float32 moving average of the weights, sharded as the masters are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensora_like.boosters.base import Booster


def check_decay(decay: float) -> None:
    """Raises ValueError: not in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay={decay} must be in [0, 1); 0.999 to 0.9999 are usual")


class EMA:
    """``ema = d * ema + (1 - d) * master`` after every update, with d rising to `decay`.

    In float32: at decay 0.9999 a bfloat16 average would never move. d is min(decay, (1 + n) / (10 + n)) after n
    updates: a constant one would still hold 13 % of the random weights that a run began with after 2 / (1 - decay)
    updates. It is a function of the step, so nothing about it is saved.

    Args:
        decay: in [0, 1).
        updates_of: updates of the run -> how many these weights have had; None where the last one was not theirs.

    Source: the schedule of TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(
        self, booster: Booster, decay: float, *, updates_of: Callable[[int], int | None] = lambda step: step
    ) -> None:
        check_decay(decay)
        self.decay = decay
        self._booster, self._updates_of = booster, updates_of
        self.shards: dict[str, Tensor] = {name: shard.clone() for name, shard in booster.master_shards()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights as they are after update `step` (from 1) into the shards."""
        count = self._updates_of(step)
        if count is None:
            return
        decay = min(self.decay, (1 + count) / (10 + count))
        masters = dict(self._booster.master_shards())
        if masters:  # on a GPU some kernels for all of them, not one for each
            torch._foreach_lerp_([self.shards[name] for name in masters], list(masters.values()), 1 - decay)
