"""How ColossalAI's optimizers keep masters and gradients: as shards (ZeRO), or whole on each rank (stage 0)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opensora_like.boosters import layout
from opensora_like.boosters.colossalai_layout import Groups, Part
from opensora_like.boosters.update import OptimizerState


class Update(Protocol):
    """One of ColossalAI's optimizers, with masters in the layout that `Part` says."""

    masters: dict[str, Tensor]  # what the optimizer updates
    shares_gradients: bool  # whether each rank of the shard group has gradients of its own part only

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """Elements [start, stop) of the part, flat, a view of a tensor laid out as the master."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]: ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Averaged gradients of what this rank has to update; live. Only after the last micro-batch of a step."""

    def step(self, norm: float) -> None:
        """Clip by a norm that is known, update, and bring the weights up to date."""

    def spread(self, state: OptimizerState) -> None:
        """Make everything follow from each rank's shard of masters and state."""


class ShardedUpdate:
    """ZeRO 1 and 2: masters are padded shards.

    Args:
        zero: ColossalAI's ``LowLevelZeroOptimizer``, or the hybrid plugin's.
        working: parameter name -> the weights that the model computes with.
    """

    shares_gradients = True

    def __init__(
        self, zero: Any, working: Mapping[str, nn.Parameter], parts: Mapping[str, Part], groups: Groups
    ) -> None:
        self._zero, self._working, self._parts, self._groups = zero, working, parts, groups
        self.masters = {name: zero.working_to_master_param[id(p)] for name, p in working.items()}

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """Without ZeRO's padding."""
        return tensor[: self._parts[name].stop - self._parts[name].start]

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing: each backward reduces."""
        return nullcontext()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Shards, padded with zeros, in the dtype of the weights."""
        for name, parameter in self._working.items():
            gradient = self._zero.pid_to_grad_store[id(parameter)].get_working_grad_by_param_id(id(parameter))
            if gradient is not None:
                yield name, gradient

    def step(self, norm: float) -> None:
        """See `Update`."""
        norms = iter([norm])
        # asked once for each group; their squares are added up
        self._zero._compute_grad_norm = lambda **_: next(norms, 0.0)
        self._zero.step()

    @torch.no_grad()
    def spread(self, state: OptimizerState) -> None:
        """Cast the masters and give every rank all of them."""
        self._zero._force_wait_all_gather()  # or one that is under way could overwrite what comes now
        for name, parameter in self._working.items():
            _, _, start, stop, *_ = self._parts[name]
            parameter.data.view(-1)[start:stop] = self.shard(name, self.masters[name]).to(parameter)
            layout.fill_from_parts(parameter.data, start, stop, group=self._groups.shard)


class ReplicatedUpdate:
    """Stage 0 of the hybrid plugin: DDP over the shard group, and masters as large as the weights.

    Args:
        optimizer: ColossalAI's ``HybridParallelNaiveOptimizer`` (float32: masters are the weights) or
            ``HybridParallelAMPOptimizer``.
        module: its ``HybridParallelModule``.
        static_graph: of its DDP, which then counts on a reduction in every backward.
    """

    shares_gradients = False

    def __init__(
        self,
        optimizer: Any,
        working: Mapping[str, nn.Parameter],
        parts: Mapping[str, Part],
        groups: Groups,
        *,
        module: Any,
        static_graph: bool,
    ) -> None:
        self._optimizer, self._working, self._parts, self._groups = optimizer, working, parts, groups
        self._module, self._static_graph = module, static_graph
        masters = getattr(optimizer, "working_to_master_map", {})
        self.masters = {name: masters.get(p, p) for name, p in working.items()}

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """The part of the whole that a ZeRO would have."""
        return tensor.detach().view(-1)[self._parts[name].start : self._parts[name].stop]

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged in the backward of the last micro-batch only, but for a static graph."""
        return nullcontext() if last or self._static_graph else self._module.no_sync()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole, in the dtype of the weights."""
        for name, parameter in self._working.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def step(self, norm: float) -> None:
        """See `Update`."""
        self._optimizer._compute_grad_norm = lambda *_, **__: norm
        self._optimizer.step()

    @torch.no_grad()
    def spread(self, state: OptimizerState) -> None:
        """Take every shard of masters and state from the rank that has it, and cast the masters."""
        for name, tensor in [*self.masters.items(), *state.whole()]:
            part = self._parts[name]
            layout.fill_from_parts(tensor.data, part.start, part.stop, group=self._groups.shard)
        for name, parameter in self._working.items():
            parameter.data.copy_(self.masters[name])
