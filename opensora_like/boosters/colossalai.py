"""ColossalAI's ZeRO: optimizer and float32 masters sharded over ranks, bfloat16 working weights on each."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters import colossalai_cpu, layout
from opensora_like.boosters.base import OptimizerFactory, ShardRange
from opensora_like.boosters.colossalai_import import import_colossalai
from opensora_like.boosters.update import OptimizerState, check_numbers, sum_of_squares
from opensora_like.registry import BOOSTERS, fit, nearest

WHERE = "booster.plugin_config"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ZeroOptions:
    """``plugin_config`` of zero1 and zero2; the names are ColossalAI's.

    Args:
        reduce_bucket_size_in_m: gradients are reduced in buckets of this many million (2**20) elements.
        overlap_allgather: let the weights arrive during the next forward, in the order in which it needs them.
        overlap_communication: reduce gradients during the backward. None: where the device can.
        cpu_offload: keep masters and optimizer state in host memory, and update there.
        communication_dtype: of gradients on the wire. None: the dtype of the weights.
        master_weights: only True: checkpoints and the EMA need float32 masters.
        initial_scale: only None: a loss is scaled in float16 alone.
    """

    reduce_bucket_size_in_m: int = 20
    overlap_allgather: bool = False
    overlap_communication: bool | None = None
    cpu_offload: bool = False
    communication_dtype: Literal["bf16", "fp32"] | None = None
    master_weights: bool = True
    initial_scale: float | None = None


def read_options(config: Mapping[str, Any], *, plugin: str, device: torch.device) -> ZeroOptions:
    """The options of a ZeRO plugin, checked.

    Raises:
        ValueError: an unknown key, a value of another type, or one that this device or booster cannot honour.
    """
    known, hints = [f.name for f in dataclasses.fields(ZeroOptions)], typing.get_type_hints(ZeroOptions)
    for key in config:
        if key not in known:
            raise ValueError(f"{WHERE}.{key}: plugin {plugin!r} has no such option; {nearest(str(key), known)}")
    options = ZeroOptions(**{k: fit(v, hints[k], f"{WHERE}.{k}") for k, v in config.items()})
    if options.reduce_bucket_size_in_m < 1:
        raise ValueError(f"{WHERE}.reduce_bucket_size_in_m={options.reduce_bucket_size_in_m} must be 1 or more")
    if not options.master_weights:
        raise ValueError(f"{WHERE}.master_weights=False: checkpoints and EMA need float32 masters; remove it")
    if options.initial_scale is not None:
        raise ValueError(f"{WHERE}.initial_scale={options.initial_scale}: only float16 scales its loss; remove it")
    if device.type == "cpu" and options.overlap_communication:
        raise ValueError(f"{WHERE}.overlap_communication=True needs a GPU (a CPU has no streams); remove it")
    if options.overlap_communication is None:
        return dataclasses.replace(options, overlap_communication=device.type != "cpu")
    return options


def _zero_plugin(stage: int, options: ZeroOptions, *, dtype: str, grad_clip: float) -> Any:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        stage=stage,
        precision=dtype,
        max_norm=grad_clip,
        reduce_bucket_size_in_m=options.reduce_bucket_size_in_m,
        communication_dtype=DTYPES.get(options.communication_dtype),
        overlap_communication=options.overlap_communication,
        overlap_allgather=options.overlap_allgather,
        cpu_offload=options.cpu_offload,
        master_weights=True,
        cast_inputs=False,  # the model casts at its door; t stays float32
    )


# name -> (reads its plugin_config, makes the plugin)
PLUGINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "zero1": (read_options, lambda *args, **given: _zero_plugin(1, *args, **given)),
    "zero2": (read_options, lambda *args, **given: _zero_plugin(2, *args, **given)),
}


@BOOSTERS.register_module("colossalai")
class ColossalAIBooster:
    """ZeRO stage 1 or 2 over all ranks.

    Gradients are reduced after every micro-batch and accumulated as shards, in the dtype of the weights: in
    stage 2 because whole gradients are not kept, in stage 1 so that both round alike.

    A trainable parameter takes part in the loss of all ranks or of none: ranks fill the same buckets.

    Args:
        plugin: "zero1" shards the optimizer, "zero2" the gradients as well.
        plugin_config: see `ZeroOptions`.
        dtype: of the working weights, "bf16" or "fp32"; masters and optimizer are float32.
        grad_clip: largest global L2 norm of the gradients; 0 does not clip.

    Raises:
        ValueError: a plugin, an option or a dtype that is not available, or ColossalAI is not installed.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        *,
        plugin: str = "zero2",
        plugin_config: dict | None = None,
        dtype: str = "bf16",
        grad_clip: float = 0.0,
        device: torch.device,
    ) -> None:
        if plugin not in PLUGINS:
            raise ValueError(f"booster.plugin={plugin!r} is not available; use one of {sorted(PLUGINS)}")
        check_numbers(dtype=dtype, grad_clip=grad_clip, dtypes=tuple(DTYPES))
        self._device = torch.device(device)
        read, make = PLUGINS[plugin]
        options = read(plugin_config or {}, plugin=plugin, device=self._device)
        if not dist.is_initialized():
            raise RuntimeError(
                "booster.type='colossalai' needs a process group; call opensora_like.runtime.start() first"
            )
        import_colossalai()
        if self._device.type == "cpu":
            colossalai_cpu.install()
        self._dtype = DTYPES[dtype]
        self._plugin = make(options, dtype=dtype, grad_clip=grad_clip)
        self.dp_rank, self.dp_size = layout.ranks()

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Cast, move and shard `model`, equal on all ranks; see `Booster`. Float buffers stay float32."""
        from colossalai.booster import Booster

        where = "booster.type='colossalai'"
        layout.check_trainable(model, where=where)
        on_meta = any(p.is_meta for p in model.parameters())
        layout.materialize(model, self._device, self._dtype)
        parameters = layout.check_trainable(model, where=where)
        layout.make_contiguous(parameters.values())
        self._ranges = {name: layout.even_range(p.shape, self.dp_rank, self.dp_size) for name, p in parameters.items()}
        exact = {} if on_meta else {name: self._cut(name, p) for name, p in parameters.items()}
        buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]

        optimizer = make_optimizer(list(parameters.values()))
        wrapped, self._zero, *_ = Booster(plugin=self._plugin).boost(model, optimizer)
        for module, name, buffer in buffers:  # the cast took them along; a position table in bfloat16 is useless
            module._buffers[name] = buffer.to(self._device)
        self._working = parameters
        self._masters = {name: self._zero.working_to_master_param[id(p)] for name, p in parameters.items()}
        self._state = OptimizerState(self._zero.optim, self._masters, self._without_padding)
        for name, weights in exact.items():  # ColossalAI makes masters of weights that it has already rounded
            self._without_padding(name, self._masters[name]).copy_(weights)
        return wrapped

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups."""
        return self._zero.param_groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing: each backward reduces."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate this rank's shards of the averaged gradients."""
        self._zero.backward(loss)

    def step(self) -> float:
        """Clip, update the shards, spread the weights. Returns: the norm before clipping."""
        groups = range(self._zero.num_param_groups)
        gradients = [g for i in groups for g in self._zero.get_working_grads_by_group_id(i)]
        squares = sum_of_squares(gradients, self._device)
        dist.all_reduce(squares)
        norm = squares.sqrt().item()
        if math.isfinite(norm):  # ColossalAI would clip by it all the same and turn every weight into nan
            norms = iter([norm])
            self._zero._compute_grad_norm = lambda **_: next(norms, 0.0)  # known by now, and of all groups
            self._zero.step()
        self._zero.zero_grad()
        return norm

    def ranges(self) -> dict[str, ShardRange]:
        """ZeRO's even part of each parameter, without its padding."""
        return dict(self._ranges)

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Views of this rank's float32 masters."""
        for name, master in self._masters.items():
            yield name, self._without_padding(name, master)

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """Views of this rank's optimizer state."""
        return self._state.shards()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the masters and give every rank all of them."""
        self._zero._force_wait_all_gather()  # or one that is under way could overwrite what comes now
        for name, parameter in self._working.items():
            _, start, stop = self._ranges[name]
            parameter.data.view(-1)[start:stop] = self._without_padding(name, self._masters[name]).to(parameter)
            layout.fill_from_parts(parameter.data, start, stop)
        self._state.read_counters()

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0; see `Booster`."""
        return layout.gather_whole(shards, self._ranges)

    def _cut(self, name: str, parameter: Tensor) -> Tensor:
        """A float32 copy of this rank's part of a whole parameter."""
        _, start, stop = self._ranges[name]
        return parameter.detach().reshape(-1)[start:stop].to(torch.float32, copy=True)

    def _without_padding(self, name: str, padded: Tensor) -> Tensor:
        _, start, stop = self._ranges[name]
        return padded[: stop - start]
