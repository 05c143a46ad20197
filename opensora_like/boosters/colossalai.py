"""ColossalAI: ZeRO with float32 masters, tensor and sequence parallelism by its plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters import colossalai_cpu, layout
from opensora_like.boosters.base import OptimizerFactory, ShardRange, ShardStrips
from opensora_like.boosters.colossalai_hybrid import HybridPlugin
from opensora_like.boosters.colossalai_import import import_colossalai
from opensora_like.boosters.colossalai_layout import part_of
from opensora_like.boosters.colossalai_options import (
    DTYPES,
    ZeroOptions,
    check_dtype,
    check_world,
    read_hybrid_options,
    read_options,
    read_sequence_options,
)
from opensora_like.boosters.colossalai_policy import check_heads, find_cuts
from opensora_like.boosters.colossalai_zero import ZeroPlugin
from opensora_like.boosters.plan import plan_of
from opensora_like.boosters.strips import gather_strips
from opensora_like.boosters.tensor_parallel import TensorCut, per_head_names
from opensora_like.boosters.update import OptimizerState, check_numbers, sum_of_squares
from opensora_like.registry import BOOSTERS, nearest

WHERE = "booster.type='colossalai'"


class PluginKind(NamedTuple):
    """How a plugin's options are read, and how it is made of them."""

    read: Callable[..., ZeroOptions]
    make: Callable[..., ZeroPlugin | HybridPlugin]


def _zero(stage: int) -> Callable[..., ZeroPlugin]:
    return lambda options, *, dtype, grad_clip: ZeroPlugin(stage, options, dtype=dtype, grad_clip=grad_clip)


PLUGINS: dict[str, PluginKind] = {
    "zero1": PluginKind(read_options, _zero(1)),
    "zero2": PluginKind(read_options, _zero(2)),
    "zero1-seq": PluginKind(read_sequence_options, _zero(1)),
    "zero2-seq": PluginKind(read_sequence_options, _zero(2)),
    "hybrid": PluginKind(read_hybrid_options, HybridPlugin),
}


@BOOSTERS.register_module("colossalai")
class ColossalAIBooster:
    """ZeRO stage 1 or 2 over all ranks, with sequence parallelism if asked for; or the hybrid plugin.

    ZeRO reduces gradients after every micro-batch and accumulates them as shards, in the dtype of the weights: in
    stage 2 because whole gradients are not kept, in stage 1 so that both round alike. Stage 0 of hybrid accumulates
    whole gradients, and reduces with the last micro-batch.

    A trainable parameter takes part in the loss of all ranks or of none: ranks fill the same buckets.

    Which parts are ColossalAI's: of zero1, zero2 and their -seq forms, LowLevelZeroPlugin and its optimizer; of
    hybrid, HybridParallelPlugin with its groups, shardformer and the linears that it cuts, its DDP, and
    HybridParallelZeroOptimizer or what it has at stage 0. Sequence parallelism is ours in all of them
    (`sequence_parallel`), so that gradients are exact for any length of text and image, and so are the policy, the
    norm by which is clipped, and all that checkpoints read.

    Args:
        plugin: "zero1" shards the optimizer, "zero2" the gradients as well; "zero1-seq" and "zero2-seq" cut the
            tokens of a sample, too; "hybrid" cuts linears and tokens, and has a `zero_stage`.
        plugin_config: see `ZeroOptions`, `SequenceOptions` and `HybridOptions`.
        dtype: of the working weights, "bf16" or "fp32"; masters and optimizer are float32. Hybrid with ZeRO takes
            "bf16" only.
        grad_clip: largest global L2 norm of the gradients; 0 does not clip.

    Raises:
        ValueError: a plugin, an option or a dtype that is not available, sizes that the number of processes does not
            fill, or ColossalAI is not installed.
        RuntimeError: torch.distributed is not initialised.
    """

    loads_in_parts = True

    def __init__(
        self,
        *,
        plugin: str = "zero2",
        plugin_config: dict | None = None,
        dtype: str = "bf16",
        grad_clip: float = 0.0,
        device: torch.device,
    ) -> None:
        self._device = torch.device(device)
        _check_plugin(plugin, self._device)
        check_numbers(dtype=dtype, grad_clip=grad_clip, dtypes=tuple(DTYPES))
        self._options = PLUGINS[plugin].read(plugin_config or {}, plugin=plugin, device=self._device)
        if plugin == "hybrid":
            check_dtype(self._options, dtype)
        if not dist.is_initialized():
            raise RuntimeError(f"{WHERE} needs a process group; call opensora_like.runtime.start() first")
        check_world(self._options, dist.get_world_size())
        import_colossalai()
        if self._device.type == "cpu":
            colossalai_cpu.install()
        self._dtype = DTYPES[dtype]
        self._plugin = PLUGINS[plugin].make(self._options, dtype=dtype, grad_clip=grad_clip)
        self._groups = self._plugin.groups
        self.dp_rank, self.dp_size = self._groups.dp_rank, self._groups.dp_size

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Cut, cast, move and shard `model`, equal on all ranks; see `Booster`. Float buffers stay float32.

        Raises:
            ValueError: heads or widths that the sizes do not divide, or a model that cannot be cut.
        """
        layout.check_trainable(model, where=WHERE)
        self._check_model(model)
        cuts = find_cuts(model, self._groups.tensor)
        on_meta = any(p.is_meta for p in model.parameters())
        layout.materialize(model, self._device, self._dtype)
        parameters = layout.check_trainable(model, where=WHERE)
        layout.make_contiguous(model.parameters())
        self._parts = {name: part_of(p.shape, cuts.get(name), self._groups) for name, p in parameters.items()}
        self._ranges = {name: part.place for name, part in self._parts.items()}
        exact = {} if on_meta else {name: self._exact(name, p) for name, p in parameters.items()}
        buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]

        optimizer = make_optimizer(list(parameters.values()))
        wrapped, self._optimizer, self._update = self._plugin.boost(
            model, optimizer, working=parameters, parts=self._parts, cuts=cuts
        )
        for module, name, buffer in buffers:  # the cast took them along; a position table in bfloat16 is useless
            module._buffers[name] = buffer.to(self._device)
        self._state = OptimizerState(self._optimizer.optim, self._update.masters, self._own)
        self._partial = self._partial_names(model, cuts)
        with torch.no_grad():
            for name, weights in exact.items():  # ColossalAI makes masters of weights that it has already rounded
                self._update.masters[name].view(-1)[: len(weights)] = weights
        return wrapped

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that share linears and read the same samples; None without tensor parallelism."""
        return self._groups.tensor

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups."""
        return self._optimizer.param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """With ZeRO each backward reduces; at stage 0 of hybrid only the last does."""
        return self._update.micro_batch(last=last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the averaged gradients, with ZeRO this rank's shards of them."""
        self._optimizer.backward(loss)

    def step(self) -> float:
        """Clip, update, spread the weights. Returns: the norm before clipping."""
        gradients = dict(self._update.gradients())
        self._sum_partial(gradients)
        norm = self._total_norm(gradients).item()
        if math.isfinite(norm):  # ColossalAI would clip by it all the same and turn every weight into nan
            self._update.step(norm)
        self._optimizer.zero_grad()
        return norm

    def ranges(self) -> dict[str, ShardRange | ShardStrips]:
        """ZeRO's even part of each (cut) parameter, without its padding; of what several ranks have, an even part."""
        return dict(self._ranges)

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Views of this rank's float32 masters."""
        for name, master in self._update.masters.items():
            yield name, self._own(name, master)

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Views of this rank's optimizer state."""
        return self._state.shards()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give each rank what it has and does not own, then cast the masters and give every rank all of them."""
        if self._groups.tensor is not None:
            for name, tensor in [*self._update.masters.items(), *self._state.whole()]:
                part = self._parts[name]
                if part.cut is None:
                    first, last = part.first - part.start, part.last - part.start
                    layout.fill_from_parts(self._update.shard(name, tensor), first, last, group=self._groups.tensor)
        self._update.spread(self._state)
        self._state.read_counters()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0; see `Booster`."""
        if self._groups.tensor is None:
            return layout.gather_whole(shards, self._ranges)
        return gather_strips(shards, self._ranges, self._device)

    def _check_model(self, model: nn.Module) -> None:
        sizes = {key: getattr(self._options, key, 1) for key in ("tp_size", "sp_size")}
        check_heads(model, **sizes, mode=getattr(self._options, "sequence_parallelism_mode", ""))

    def _partial_names(self, model: nn.Module, cuts: Mapping[str, TensorCut]) -> list[str]:
        """Parameters of which the ranks that share linears have a part of the gradient each."""
        if self._groups.tokens_follow_linears:
            return [name for name in self._parts if name not in cuts]
        names = per_head_names(model, plan_of(model, where=WHERE)) if cuts else []
        return [name for name in names if name in self._parts]

    def _sum_partial(self, gradients: Mapping[str, Tensor]) -> None:
        """Over the ranks whose heads, or tokens, they come from; a bucket at a time."""
        shared = [gradients[name] for name in self._partial if name in gradients]
        for bucket in layout.buckets(shared, self._options.reduce_bucket_size_in_m * 2**20):
            flat = torch.cat([g.reshape(-1) for g in bucket]).to(self._device)
            dist.all_reduce(flat, group=self._groups.tensor)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _total_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Of all gradients, each counted once. Returns: float64 scalar."""
        cut = [g for name, g in gradients.items() if self._parts[name].cut is not None]
        whole = [g for name, g in gradients.items() if self._parts[name].cut is None]
        squares = sum_of_squares(cut, self._device)
        squares += sum_of_squares(whole, self._device) / self._groups.tensor_size
        for group, counts in ((self._groups.shard, self._update.shares_gradients), (self._groups.tensor, True)):
            if counts and group is not None:
                dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def _exact(self, name: str, whole: Tensor) -> Tensor:
        """A float32 copy of what this rank's master of a parameter begins with, flat."""
        part = self._parts[name]
        here = part.take(whole.detach())
        if not self._plugin.keeps_whole_masters:
            here = here[part.start : part.stop]
        return here.to(torch.float32, copy=True)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """The flat part of a tensor laid out as a master that this rank owns, a view."""
        part = self._parts[name]
        return self._update.shard(name, tensor)[part.first - part.start : part.last - part.start]


def _check_plugin(plugin: str, device: torch.device) -> None:
    if plugin == "gemini":
        why = "this booster cannot read its chunks, which EMA and checkpoints need"
        if device.type != "cuda":
            why = "it runs on CUDA only (an assertion of its chunks fails elsewhere)"
        raise ValueError(
            f"booster.plugin='gemini' is not available: {why}; for sharded weights use booster.type='fsdp2', for a"
            " sharded optimizer booster.plugin='zero2'"
        )
    if plugin not in PLUGINS:
        raise ValueError(
            f"booster.plugin={plugin!r} is not available; use one of {sorted(PLUGINS)}; {nearest(plugin, PLUGINS)}"
        )
