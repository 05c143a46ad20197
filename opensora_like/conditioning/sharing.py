"""Ranks that are given the same batches, as those of a tensor or sequence group, deal its samples for encoding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Sharing:
    """Of a batch of B samples each of n ranks encodes B / n, rounded up, and has them all afterwards.

    What is over is filled up with the last sample: those ranks would only wait for the others. Of a batch of one
    every rank encodes that one.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)

    def own(self, num_samples: int) -> list[int]:
        """Which samples this rank encodes; equally many on each rank."""
        rounds = -(-num_samples // self._size)
        return [min(i * self._size + self._rank, num_samples - 1) for i in range(rounds)]

    def joined(self, part: Tensor, num_samples: int) -> Tensor:
        """What all ranks made of their samples, in the order of the batch; all call it together.

        Args:
            part: [len(own), ...], of one shape on all ranks.

        Returns: [num_samples, ...].
        """
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self._size)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.stack(parts, dim=1).flatten(0, 1)[:num_samples]


def build_sharing(dp_rank: int, *, dp_size: int) -> Sharing | None:
    """Of the ranks that have this one's batches, None where no other has; all ranks call it together.

    Args:
        dp_rank, dp_size: of the booster.
    """
    world_size = dist.get_world_size()
    if dp_size == world_size:
        return None
    everyone: list[int] = [0] * world_size
    dist.all_gather_object(everyone, dp_rank)
    groups = {
        number: dist.new_group([rank for rank, of_rank in enumerate(everyone) if of_rank == number])
        for number in sorted(set(everyone))
    }
    return Sharing(groups[dp_rank])
