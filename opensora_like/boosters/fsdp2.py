"""torch's FSDP2: weights, gradients and optimizer sharded, with replicas, tensor and sequence parallelism."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opensora_like.boosters import layout
from opensora_like.boosters.base import OptimizerFactory, ShardRange, ShardStrips
from opensora_like.boosters.mesh import Grid, build_grid, check_grid
from opensora_like.boosters.plan import modules_at, plan_of
from opensora_like.boosters.sequence_parallel import (
    Mode,
    apply_sequence_parallelism,
    build_sequence_group,
    check_sequence,
    data_ranks,
)
from opensora_like.boosters.strips import fill_rows, gather_strips, owned_rows
from opensora_like.boosters.tensor_parallel import TensorCut, apply_tensor_parallelism, owned, per_head_names
from opensora_like.boosters.update import OptimizerState, check_numbers, sum_of_squares
from opensora_like.models.base import ParallelPlan
from opensora_like.registry import BOOSTERS

WHERE = "booster.type='fsdp2'"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@BOOSTERS.register_module("fsdp2")
class FSDP2Booster:
    """Each block of the model's plan is gathered for its forward and backward; float32 masters stay sharded.

    Processes form the grid [dp_replicate_size, shards, sp_size, tp_size], neighbours in the last; shards are what is
    left, and weights are sharded over shards x sp_size.

    With accumulation, micro-batches before the last add their gradients where they are, unsharded and in
    `reduce_dtype`: no communication, but as much memory on each rank as the gradients of the whole model
    (divided by `tp_size`), 4 bytes a parameter in float32.

    Args:
        tp_size: ranks that share each linear and each head of attention, as the model's plan says.
        dp_replicate_size: copies of all shards (HSDP); put one on each machine.
        sp_size: ranks that share the tokens of a sample.
        sequence_parallelism_mode: "all_to_all" exchanges heads for tokens, "ring" passes keys and values round.
        reshard_after_forward: drop a block's weights after its forward and gather them again for its backward;
            without it they stay in between: more memory, less communication.
        cpu_offload: keep masters, gradients and optimizer state in host memory, and update there.
        reduce_dtype: of gradients on the wire and while they are accumulated.
        dtype: of the weights in forward and backward; masters and optimizer are float32.
        grad_clip: largest global L2 norm of the gradients; 0 does not clip.

    Raises:
        ValueError: sizes that the number of processes does not fill, an unknown mode or dtype.
        RuntimeError: torch.distributed is not initialised.
    """

    loads_in_parts = True

    def __init__(
        self,
        *,
        tp_size: int = 1,
        dp_replicate_size: int = 1,
        sp_size: int = 1,
        sequence_parallelism_mode: Mode = "all_to_all",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        reduce_dtype: Literal["bf16", "fp32"] = "fp32",
        dtype: str = "bf16",
        grad_clip: float = 0.0,
        device: torch.device,
    ) -> None:
        check_numbers(dtype=dtype, grad_clip=grad_clip, dtypes=tuple(DTYPES))
        if reduce_dtype not in DTYPES:
            raise ValueError(f"booster.reduce_dtype={reduce_dtype!r} is not supported; use one of {list(DTYPES)}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{WHERE} needs a process group; call opensora_like.runtime.start() first")
        rank, world_size = layout.ranks()
        check_grid(world_size, tp_size=tp_size, sp_size=sp_size, dp_replicate_size=dp_replicate_size)
        check_sequence(sp_size, sequence_parallelism_mode, world_size)
        self._device, self._grad_clip = torch.device(device), grad_clip
        self._reshard = reshard_after_forward
        self._precision = MixedPrecisionPolicy(
            param_dtype=DTYPES[dtype],
            reduce_dtype=DTYPES[reduce_dtype],
            cast_forward_inputs=False,  # the model casts at its door; t stays float32
        )
        self._offload = CPUOffloadPolicy(pin_memory=self._device.type == "cuda") if cpu_offload else OffloadPolicy()
        self._grid: Grid = build_grid(self._device.type, replicate=dp_replicate_size, tp_size=tp_size)
        self._sequence = build_sequence_group(sp_size, sequence_parallelism_mode, tp_size=tp_size)
        self.dp_rank, self.dp_size = data_ranks(rank, world_size, sp_size=sp_size, tp_size=tp_size)

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Cut, shard and move `model`, equal on all ranks; see `Booster`. Blocks are moved and sharded one by one.

        Raises:
            ValueError: a model without a plan, or heads or widths that the sizes do not divide.
        """
        layout.check_trainable(model, where=WHERE)
        _check_meta(model)
        plan = plan_of(model, where=WHERE)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        cuts: dict[str, TensorCut] = {}
        if self._grid.tensor is not None:
            cuts = apply_tensor_parallelism(model, plan, self._grid.tensor)
        if self._sequence is not None:
            apply_sequence_parallelism(model, self._sequence)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

        self._shard(model, plan)
        self._fill_meta(model)
        self._model = model
        self._sharded = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # the optimizer and all bookkeeping see plain tensors that share memory with the sharded ones
        self._masters = {name: nn.Parameter(_local(p).detach()) for name, p in self._sharded.items()}
        self._per_head = [n for n in per_head_names(model, plan) if n in self._masters] if cuts else []
        self._cut_names = frozenset(cuts)
        self._rows = {name: self._own_rows(name, master) for name, master in self._masters.items()}
        self._ranges = {name: self._range_of(name, shapes[name], cuts.get(name)) for name in self._masters}
        self._optimizer = make_optimizer(list(self._masters.values()))
        self._state = OptimizerState(self._optimizer, self._masters, self._own)
        return model

    def _shard(self, model: nn.Module, plan: ParallelPlan) -> None:
        # the model's output is a view, and nothing here writes into it
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        common = {"mesh": self._grid.sharding, "mp_policy": self._precision, "offload_policy": self._offload}
        for _, block in modules_at(model, plan.blocks):
            fully_shard(block, reshard_after_forward=self._reshard, **common)
        fully_shard(model, reshard_after_forward=False, **common)  # its backward comes at once

    def shard_frozen(self, model: nn.Module) -> nn.Module:
        """Shard and move a model that is only asked, in the dtype it has; all ranks ask it equally often."""
        self._shard(model, plan_of(model, where=WHERE))
        self._fill_meta(model)
        return model

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that share linears and read the same samples; None without tensor parallelism."""
        return self._grid.tensor

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups."""
        return self._optimizer.param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in the backward of the last micro-batch only."""
        self._model.set_requires_gradient_sync(last)
        self._model.set_is_last_backward(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> float:
        """Clip, update the shards, clear. Returns: the norm before clipping."""
        self._take_gradients()
        total = self._total_norm()
        norm = total.item()
        if math.isfinite(norm):
            if self._grad_clip:
                nn.utils.clip_grads_with_norm_(self._masters.values(), self._grad_clip, total.float())
            self._optimizer.step()
        for name, parameter in self._sharded.items():
            parameter.grad = self._masters[name].grad = None
        self._forget_gathered()
        return norm

    def _take_gradients(self) -> None:
        """Give the masters this rank's gradients, those of per-head parameters summed over the heads' ranks."""
        for name, parameter in self._sharded.items():
            master, local = self._masters[name], _local(parameter)
            if local.data_ptr() != master.data_ptr():
                raise RuntimeError(f"{WHERE}: {name} was moved after prepare; do not call .to() on a prepared model")
            master.grad = None if parameter.grad is None else _local(parameter.grad)
        shared = [self._masters[name].grad for name in self._per_head]
        shared = [grad for grad in shared if grad is not None]
        if shared:
            flat = torch.cat([grad.reshape(-1) for grad in shared]).to(self._device)
            dist.all_reduce(flat, group=self._grid.tensor)
            for grad, part in zip(shared, flat.split([g.numel() for g in shared]), strict=True):
                grad.copy_(part.view_as(grad))

    def _total_norm(self) -> Tensor:
        """Of all gradients, each counted once. Returns: float64 scalar, on the masters' device."""
        tensor_size = 1 if self._grid.tensor is None else dist.get_world_size(self._grid.tensor)
        cut, whole = [], []
        for name, master in self._masters.items():
            if master.grad is not None:
                (cut if name in self._cut_names else whole).append(master.grad)
        home = next(iter(self._masters.values())).device
        squares = sum_of_squares(cut, home) + sum_of_squares(whole, home) / tensor_size
        squares = squares.to(self._device)
        for group in (self._grid.shard, self._grid.tensor):
            if group is not None:
                dist.all_reduce(squares, group=group)
        return squares.sqrt().to(home)

    def ranges(self) -> dict[str, ShardRange | ShardStrips]:
        """Rows of FSDP's shard; where several ranks hold the same shard, an even part of its rows."""
        return dict(self._ranges)

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Views of this rank's float32 shards."""
        for name, master in self._masters.items():
            yield name, self._own(name, master.data)

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Views of this rank's part of the optimizer's state."""
        return self._state.shards()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take rows from the ranks that own them, and let the next forward gather the weights anew."""
        for name, master in self._masters.items():
            self._fill(name, master.data)
        for name, value in self._state.whole():
            self._fill(name, value)
        self._state.read_counters()
        self._forget_gathered()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0; see `Booster`."""
        return gather_strips(shards, self._ranges, self._device)

    def _fill_meta(self, model: nn.Module) -> None:
        """Zeros in host memory or on the device for weights on ``meta``, and buffers to the device."""
        home = torch.device("cpu") if isinstance(self._offload, CPUOffloadPolicy) else self._device
        if any(p.is_meta for p in model.parameters()):
            model._apply(lambda t: torch.zeros_like(t, device=home) if t.is_meta else t)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)

    def _forget_gathered(self) -> None:
        """Weights that are still gathered, after a forward without backward, are those from before a change."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _copies(self, name: str) -> tuple[dist.ProcessGroup | None, tuple[int, int]]:
        """The ranks with this rank's shard of a parameter, and its index among how many."""
        if name in self._cut_names:
            return self._grid.cut_copies, self._grid.cut_copy_index
        return self._grid.copies, self._grid.copy_index

    def _own_rows(self, name: str, master: Tensor) -> tuple[int, int]:
        return owned_rows(len(master), *self._copies(name)[1])

    def _own(self, name: str, local: Tensor) -> Tensor:
        """The rows of a tensor laid out as a master that this rank owns, flat."""
        first, last = self._rows[name]
        return local[first:last].view(-1)

    def _fill(self, name: str, local: Tensor) -> None:
        group, (_, count) = self._copies(name)
        if group is not None:
            fill_rows(local, group, count, self._device)

    def _range_of(self, name: str, shape: tuple[int, ...], cut: TensorCut | None) -> ShardRange | ShardStrips:
        first = min(-(-shape[0] // self._grid.shard_size) * self._grid.shard_index, shape[0])  # as FSDP does
        low, high = (first + row for row in self._rows[name])
        if cut is not None:
            return owned(cut, low, high)
        width = math.prod(shape[1:])
        return ShardRange(shape, low * width, high * width)


def _check_meta(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lost := [name for name, t in tensors if t.is_meta and not t.requires_grad]:
        raise ValueError(
            f"{WHERE}: {len(lost)} frozen tensors on meta, {lost[:3]}; checkpoints hold trainable ones only; load these"
            " before"
        )


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
