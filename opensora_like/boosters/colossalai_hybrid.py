"""ColossalAI's HybridParallelPlugin: its groups, its tensor-parallel layers, its DDP or ZeRO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from opensora_like.boosters.colossalai_layout import Groups, Part
from opensora_like.boosters.colossalai_options import DTYPES, SEQUENCE_MODES, SPLIT_GATHER, HybridOptions
from opensora_like.boosters.colossalai_policy import build_policy
from opensora_like.boosters.colossalai_updates import ReplicatedUpdate, ShardedUpdate, Update
from opensora_like.boosters.ddp import buffers_are_constant
from opensora_like.boosters.sequence_parallel import SequenceGroup
from opensora_like.boosters.tensor_parallel import TensorCut


class HybridPlugin:
    """A HybridParallelPlugin, and what is done with it.

    ColossalAI's: the mesh of process groups, the linears that are cut, the module around the model, DDP at stage 0,
    the optimizers. Ours: the policy (from the model's plan), tokens cut over a sequence group, gradients of norms
    that each rank uses for its own heads, and the norm by which is clipped: ColossalAI's does not count fused
    linears as cut, and takes the largest norm of the groups.
    """

    def __init__(self, options: HybridOptions, *, dtype: str, grad_clip: float) -> None:
        self.options = options
        self.keeps_whole_masters = options.zero_stage == 0
        self._plugin = plugin = _make_plugin(options, dtype=dtype, grad_clip=grad_clip)
        mesh = plugin.pg_mesh
        sequence = None
        if options.sequence_parallelism_mode == SPLIT_GATHER:
            sequence = SequenceGroup(plugin.tp_group, dist.get_rank(plugin.tp_group), options.tp_size, "split_gather")
        elif options.sp_size > 1:
            mode = SEQUENCE_MODES[options.sequence_parallelism_mode]
            sequence = SequenceGroup(plugin.sp_group, dist.get_rank(plugin.sp_group), options.sp_size, mode)
        self.groups = Groups(
            shard=plugin.mixed_dp_group,
            tensor=plugin.tp_group if options.tp_size > 1 else None,
            sequence=sequence,
            dp_rank=int(mesh.coordinate(plugin.dp_axis)),
            dp_size=mesh.size(plugin.dp_axis),
        )

    def boost(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        working: Mapping[str, nn.Parameter],
        parts: Mapping[str, Part],
        cuts: Mapping[str, TensorCut],
    ) -> tuple[nn.Module, Any, Update]:
        """Cut, cast and wrap. Returns: what the step calls, ColossalAI's optimizer, and the way to work with it."""
        from colossalai.booster import Booster
        from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

        plugin, replicated = self._plugin, self.keeps_whole_masters
        # the plugin would wrap it in a DDP for ZeRO, too, where one rank has all data, and that gives gradients back
        # that ZeRO has already taken
        module = HybridParallelModule(
            model,
            precision=plugin.precision,
            shard_config=plugin.shard_config,
            dp_group=plugin.mixed_dp_group,
            tp_group=plugin.tp_group,
            sp_group=plugin.sp_group,
            use_ddp=replicated,
            ddp_config={k: v for k, v in plugin.ddp_config.items() if k != "broadcast_buffers"}
            | buffers_are_constant(),
            custom_policy=build_policy(cuts, self.groups),
            overlap_allgather=self.options.overlap_allgather,
        )
        module.convert_fn = None  # the model casts at its door; t stays float32
        wrapped, optimizer, *_ = Booster(plugin=plugin).boost(module, optimizer)
        if not replicated:
            return wrapped, optimizer, ShardedUpdate(optimizer, working, parts, self.groups)
        static_graph = self.options.static_graph
        update = ReplicatedUpdate(optimizer, working, parts, self.groups, module=wrapped, static_graph=static_graph)
        return wrapped, optimizer, update


def _make_plugin(options: HybridOptions, *, dtype: str, grad_clip: float) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin

    class Plugin(HybridParallelPlugin):
        """Its groups live as long as the process: to take them away at a time that Python chooses hangs others."""

        def __del__(self) -> None: ...

    # of split_gather it would have its linears gather even parts; ours, put in their place, need no word of it
    sequence = options.enable_sequence_parallelism and options.sequence_parallelism_mode != SPLIT_GATHER
    return Plugin(
        tp_size=options.tp_size,
        pp_size=1,
        sp_size=options.sp_size if sequence else None,
        precision=dtype,
        zero_stage=options.zero_stage,
        enable_sequence_parallelism=sequence,
        sequence_parallelism_mode=options.sequence_parallelism_mode if sequence else None,
        max_norm=grad_clip,
        find_unused_parameters=options.find_unused_parameters,
        static_graph=options.static_graph,
        ddp_bucket_cap_mb=options.reduce_bucket_size_in_m * DTYPES[dtype].itemsize,
        enable_metadata_cache=False,
        zero_bucket_size_in_m=options.reduce_bucket_size_in_m,
        cpu_offload=options.cpu_offload,
        communication_dtype=DTYPES.get(options.communication_dtype),
        overlap_communication=options.overlap_communication,
        overlap_allgather=options.overlap_allgather,
    )
