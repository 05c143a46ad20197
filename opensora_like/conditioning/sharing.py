"""Ranks that are given the same batches, as those of a tensor or sequence group, deal its samples: each reads and
encodes its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

GOLDEN = 2654435769  # 2**32 over the golden ratio


class Sharing:
    """Of a batch of B samples each of n ranks reads and encodes B / n, rounded up, and has the latents of all.

    From one micro-batch to the next the first sample goes to another rank, so batches of one sample are dealt as well.

    Args:
        group: the ranks.
        dp_size: how far the numbers of two micro-batches are apart that a rank gets one after the other.
    """

    def __init__(self, group: ProcessGroup, *, dp_size: int = 1) -> None:
        self._group, self.rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self._dp_size = dp_size

    def _first(self, index: int) -> int:
        """Who has the first sample: each rank once in any n micro-batches from a multiple of n on.

        Not simply the rank after the last one: where the loader has n workers, all that a rank reads would then come
        to one of them. Each round is shifted by a step of the golden ratio, which favours no worker, however many.
        """
        turn = index // self._dp_size
        shift = (turn // self._size * GOLDEN % 2**32) * self._size >> 32
        return (turn + shift) % self._size

    def owner(self, place: int, index: int) -> int:
        """The rank within the group that reads the sample at `place` of micro-batch `index`."""
        return (self._first(index) + place) % self._size

    def places(self, num_samples: int, index: int) -> list[int]:
        """Which samples this rank reads; those of all ranks are the whole micro-batch, each once."""
        return [place for place in range(num_samples) if self.owner(place, index) == self.rank]

    def own(self, num_samples: int, index: int) -> list[int]:
        """Which samples this rank encodes, equally many on each rank: what is missing is filled up with the last one.

        Those ranks would only wait for the others.
        """
        places, rounds = self.places(num_samples, index), -(-num_samples // self._size)
        return places + [num_samples - 1] * (rounds - len(places))

    def joined(self, part: Tensor, num_samples: int, index: int) -> Tensor:
        """What all ranks made of their samples, in the order of the batch; all call it together.

        Args:
            part: [len(own), ...], of one shape on all ranks.

        Returns: [num_samples, ...].
        """
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self._size)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        first = self._first(index)
        return torch.stack(parts[first:] + parts[:first], dim=1).flatten(0, 1)[:num_samples]

    def everyone(self, value: Any) -> list[Any]:
        """A small object of each rank, in the order of the ranks; all call it together."""
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, value, group=self._group)  # over gloo: it does not wait for a GPU
        return found


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
    return Sharing(groups[dp_rank], dp_size=dp_size)
