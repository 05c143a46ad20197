"""Replicated data parallelism by torch, and the plain single process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora_like.boosters import layout
from opensora_like.boosters.base import OptimizerFactory, ShardRange
from opensora_like.boosters.sequence_parallel import (
    Mode,
    apply_sequence_parallelism,
    build_sequence_group,
    check_sequence,
    data_ranks,
)
from opensora_like.boosters.update import OptimizerState, check_numbers, sum_of_squares
from opensora_like.registry import BOOSTERS


class Autocast(nn.Module):
    """Runs a module under bfloat16 autocast; its weights stay float32."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        super().__init__()
        self.module, self._device_type = module, device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # whatever the wrapped model takes
        with torch.autocast(self._device_type, dtype=torch.bfloat16):
            return self.module(*args, **kwargs)


@BOOSTERS.register_module("ddp")
class DDPBooster:
    """Every rank holds the whole model and optimizer in float32; gradients are averaged in float32.

    The reference for the other backends. Without a process group it is a single process.

    With sequence parallelism the ranks of a group read the same samples and each works on some of their tokens; the
    average over all ranks is the exact gradient (`sequence_parallel`).

    Args:
        sp_size: ranks that share the tokens of a sample.
        sequence_parallelism_mode: "all_to_all" exchanges heads for tokens, "ring" passes keys and values round.
        dtype: "bf16" runs the forward under autocast with float32 weights; "fp32" does not.
        grad_clip: largest global L2 norm of the gradients; 0 does not clip.
        find_unused_parameters: for models of which a step may leave parameters out; costs a walk of the graph.

    Raises:
        ValueError: an unknown mode or dtype, or a size that does not divide the number of processes.
    """

    def __init__(
        self,
        *,
        sp_size: int = 1,
        sequence_parallelism_mode: Mode = "all_to_all",
        dtype: str = "bf16",
        grad_clip: float = 0.0,
        find_unused_parameters: bool = False,
        device: torch.device,
    ) -> None:
        check_numbers(dtype=dtype, grad_clip=grad_clip, dtypes=("bf16", "fp32"))
        self._dtype, self._grad_clip, self._device = dtype, grad_clip, torch.device(device)
        self._find_unused = find_unused_parameters
        self._rank, self._world_size = layout.ranks()
        check_sequence(sp_size, sequence_parallelism_mode, self._world_size)
        self._sequence = build_sequence_group(sp_size, sequence_parallelism_mode) if sp_size > 1 else None
        self.dp_rank, self.dp_size = data_ranks(self._rank, self._world_size, sp_size=sp_size)

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Move `model` to the device and wrap it; see `Booster`.

        Raises:
            ValueError: heads that `sp_size` does not divide, or a model whose tokens cannot be cut.
        """
        layout.check_trainable(model, where="booster.type='ddp'")
        if self._sequence is not None:
            apply_sequence_parallelism(model, self._sequence)
        layout.materialize(model, self._device, torch.float32)
        model.to(self._device)
        self._parameters = layout.check_trainable(model, where="booster.type='ddp'")
        layout.make_contiguous(self._parameters.values())
        self._ranges = {
            name: layout.even_range(p.shape, self._rank, self._world_size) for name, p in self._parameters.items()
        }
        self._optimizer = make_optimizer(list(self._parameters.values()))
        self._state = OptimizerState(self._optimizer, self._parameters, self._own)
        self._replicas: DistributedDataParallel | None = None
        if self._world_size > 1:
            self._replicas = DistributedDataParallel(
                model,
                device_ids=[self._device.index] if self._device.type == "cuda" else None,
                **buffers_are_constant(),
                find_unused_parameters=self._find_unused,
                gradient_as_bucket_view=True,
            )
        called = self._replicas if self._replicas is not None else model
        return Autocast(called, self._device.type) if self._dtype == "bf16" else called

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups."""
        return self._optimizer.param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over ranks in the backward of the last micro-batch only."""
        return nullcontext() if last or self._replicas is None else self._replicas.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self) -> float:
        """Clip, update, clear. Returns: the norm before clipping."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        total = sum_of_squares(gradients, self._device).sqrt()
        norm = total.item()
        if math.isfinite(norm):
            if self._grad_clip:
                nn.utils.clip_grads_with_norm_(self._parameters.values(), self._grad_clip, total.float())
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def ranges(self) -> dict[str, ShardRange]:
        """An even part of each parameter, so that a save writes everything once and in parallel."""
        return dict(self._ranges)

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Views of this rank's part of the float32 parameters."""
        for name, parameter in self._parameters.items():
            yield name, self._own(name, parameter.data)

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Views of this rank's part of the optimizer's state."""
        return self._state.shards()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take every part of weights and optimizer from the rank that owns it."""
        for name, parameter in self._parameters.items():
            layout.fill_from_parts(parameter.data, *self._ranges[name][1:])
        for name, value in self._state.whole():
            layout.fill_from_parts(value, *self._ranges[name][1:])
        self._state.read_counters()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0; see `Booster`."""
        return layout.gather_whole(shards, self._ranges)

    def _own(self, name: str, whole: Tensor) -> Tensor:
        _, start, stop = self._ranges[name]
        return whole.view(-1)[start:stop]


def buffers_are_constant() -> dict[str, bool]:
    """DDP must not write buffers before each forward: two forwards before one backward would fail. Renamed in 2.13."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
