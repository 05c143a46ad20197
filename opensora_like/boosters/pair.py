"""Two models that are trained in turns, each with a booster of its own, as one booster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters.base import BESIDE, Booster, OptimizerFactory, ShardRange, ShardStrips

GENERATOR, CRITIC = "generator", "critic"
PREFIXES = {GENERATOR: "", CRITIC: BESIDE}  # of names in checkpoints


class PairBooster:
    """A generator and a critic; whose turn it is takes the step, and nothing of the other one moves.

    Names of the critic begin with "critic.", the generator's are plain: whoever samples or exports leaves those out.

    Args:
        generator, critic: boosters with the same settings. They are called by the same ranks in the same order.
    """

    def __init__(self, generator: Booster, critic: Booster) -> None:
        self.parts: dict[str, Booster] = {GENERATOR: generator, CRITIC: critic}
        self.dp_rank, self.dp_size = generator.dp_rank, generator.dp_size
        self._turn = GENERATOR

    def take_turn(self, role: str) -> None:
        """The steps from here on are those of `role`."""
        self._turn = role

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Prepare what is given; both at once, or one after the other, so that the host never holds two whole models.

        Args:
            model: an ``nn.ModuleDict`` with "generator", "critic" or both.

        Returns: what the step calls, the same way.

        Raises:
            ValueError: a name of the generator begins as the critic's do.
        """
        assert isinstance(model, nn.ModuleDict)
        if taken := [name for name, _ in model.named_parameters() if name.startswith(f"{GENERATOR}.{BESIDE}")]:
            raise ValueError(f"distill: {taken[0]!r} is named as a critic's weight is; rename the denoiser's module")
        return nn.ModuleDict({role: self.parts[role].prepare(model[role], make_optimizer) for role in model})

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that share linears and read the same samples; None without tensor parallelism."""
        return getattr(self.parts[GENERATOR], "tensor_group", None)

    @property
    def param_groups(self) -> list[dict]:
        """The groups of the optimizer whose turn it is."""
        return self.parts[self._turn].param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward of the model whose turn it is."""
        return self.parts[self._turn].micro_batch(last=last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate its gradients."""
        self.parts[self._turn].backward(loss)

    def step(self) -> float:
        """Clip, update, clear. Returns: the norm of its gradients before clipping."""
        return self.parts[self._turn].step()

    def ranges(self) -> dict[str, ShardRange | ShardStrips]:
        """Of both."""
        return dict(_named((role, part.ranges().items()) for role, part in self.parts.items()))

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Of both."""
        return _named((role, part.master_shards()) for role, part in self.parts.items())

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Of both."""
        found: dict[str, dict[str, Tensor]] = {}
        for role, part in self.parts.items():
            for kind, tensors in part.optimizer_shards().items():
                found.setdefault(kind, {}).update(_named([(role, tensors.items())]))
        return found

    def refresh(self) -> None:
        """Make the working weights of both equal to their masters."""
        for part in self.parts.values():
            part.refresh()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0, of either or both; see `Booster`."""
        own = {name: shard for name, shard in shards.items() if not name.startswith(BESIDE)}
        beside = {name.removeprefix(BESIDE): s for name, s in shards.items() if name.startswith(BESIDE)}
        found = [(GENERATOR, self.parts[GENERATOR].gather(own).items())]
        found.append((CRITIC, self.parts[CRITIC].gather(beside).items()))
        return dict(_named(found))


def _named(parts: Iterable[tuple[str, Iterable[tuple[str, object]]]]) -> Iterator[tuple[str, object]]:
    """Names as they are in checkpoints."""
    for role, items in parts:
        for name, value in items:
            yield PREFIXES[role] + name, value
