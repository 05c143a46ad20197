"""ColossalAI's LowLevelZeroPlugin, with sequence parallelism in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from opensora_like.boosters import layout
from opensora_like.boosters.colossalai_layout import Groups, Part
from opensora_like.boosters.colossalai_options import DTYPES, SEQUENCE_MODES, SequenceOptions, ZeroOptions
from opensora_like.boosters.colossalai_updates import ShardedUpdate, Update
from opensora_like.boosters.sequence_parallel import apply_sequence_parallelism, build_sequence_group, data_ranks
from opensora_like.boosters.tensor_parallel import TensorCut


class ZeroPlugin:
    """ZeRO over all ranks. Those of a sequence group read the same data, and `sequence_parallel` makes the average
    over all ranks the exact gradient."""

    keeps_whole_masters = False

    def __init__(self, stage: int, options: ZeroOptions, *, dtype: str, grad_clip: float) -> None:
        from colossalai.booster.plugin import LowLevelZeroPlugin

        sp_size, sequence = 1, None
        if isinstance(options, SequenceOptions):
            sp_size = options.sp_size
            sequence = build_sequence_group(sp_size, SEQUENCE_MODES[options.sequence_parallelism_mode])
        dp_rank, dp_size = data_ranks(*layout.ranks(), sp_size=sp_size)
        self.groups = Groups(dist.group.WORLD, None, sequence, dp_rank, dp_size)
        self._plugin = LowLevelZeroPlugin(
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

    def boost(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        working: Mapping[str, nn.Parameter],
        parts: Mapping[str, Part],
        cuts: Mapping[str, TensorCut],
    ) -> tuple[nn.Module, Any, Update]:
        """Cast and shard. Returns: what the step calls, ColossalAI's optimizer, and the way to work with it."""
        from colossalai.booster import Booster

        if self.groups.sequence is not None:
            apply_sequence_parallelism(model, self.groups.sequence)
        wrapped, zero, *_ = Booster(plugin=self._plugin).boost(model, optimizer)
        return wrapped, zero, ShardedUpdate(zero, working, parts, self.groups)
