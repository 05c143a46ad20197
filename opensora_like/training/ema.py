"""A float32 moving average of the weights, sharded as the masters are."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_like.boosters.base import Booster


class EMA:
    """``ema = decay * ema + (1 - decay) * master`` after every update.

    In float32: at decay 0.9999 a bfloat16 average would never move.
    """

    def __init__(self, booster: Booster, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must be in [0, 1); 0.999 to 0.9999 are usual")
        self.decay = decay
        self._booster = booster
        self.shards: dict[str, Tensor] = {name: shard.clone() for name, shard in booster.master_shards()}

    @torch.no_grad()
    def update(self) -> None:
        """Average the weights as they are now into the shards."""
        for name, master in self._booster.master_shards():
            self.shards[name].lerp_(master, 1 - self.decay)
