"""One video made by several processes: the first of a group encodes and decodes, all of them denoise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters.plan import divisors, head_counts, plan_of
from opensora_like.boosters.sequence_parallel import (
    SequenceGroup,
    apply_sequence_parallelism,
    build_sequence_group,
)
from opensora_like.runtime import Runtime
from opensora_like.settings import InferenceConfig

Inputs = Mapping[str, Mapping[str, Tensor]]  # kind of input -> name -> tensor


def sequence_size(cfg: InferenceConfig, runtime: Runtime) -> int:
    """Processes that share a video.

    Raises:
        ValueError: a size that does not divide the number of processes.
    """
    world_size = runtime.world_size
    if cfg.sp_size == "all":
        return world_size
    if cfg.sp_size < 1 or world_size % cfg.sp_size:
        raise ValueError(
            f"sp_size={cfg.sp_size} does not divide the {world_size} processes; start a multiple of it, or use one of "
            f"{divisors(world_size)} or 'all'"
        )
    return cfg.sp_size


def join_group(cfg: InferenceConfig, runtime: Runtime) -> SequenceGroup | None:
    """The group of this rank, None where every process makes videos alone; every rank calls it."""
    return build_sequence_group(sequence_size(cfg, runtime), cfg.sp_mode)


def is_leader(sequence: SequenceGroup | None) -> bool:
    """Whether this rank encodes, decodes and writes."""
    return sequence is None or sequence.rank == 0


def cut_sequence(model: nn.Module, sequence: SequenceGroup) -> None:
    """Let `model` work on this rank's tokens.

    Raises:
        ValueError: a model that cannot be cut, or heads that cannot be shared out.
    """
    if sequence.mode == "all_to_all":
        for _, _, path, heads in head_counts(model, plan_of(model, where=f"sp_size={sequence.size}")):
            if heads % sequence.size:
                raise ValueError(
                    f"sp_mode='all_to_all': sp_size={sequence.size} does not divide the {heads} heads of {path}; use "
                    f"one of {divisors(heads)}, or --sp-mode ring"
                )
    apply_sequence_parallelism(model, sequence)


def send(inputs: Inputs | None, sequence: SequenceGroup) -> None:
    """Give the group what the model is to be called with; None ends it. The leader calls it."""
    leader = dist.get_global_rank(sequence.group, 0)
    named = _flat(inputs) if inputs is not None else {}
    head = None if inputs is None else {key: (tuple(t.shape), t.dtype) for key, t in named.items()}
    dist.broadcast_object_list([head], src=leader, group=sequence.group)
    for tensor in named.values():
        dist.broadcast(tensor, src=leader, group=sequence.group)


def receive(sequence: SequenceGroup, device: torch.device) -> Inputs | None:
    """What the leader sent. Returns: its inputs on `device`, or None at the end."""
    leader = dist.get_global_rank(sequence.group, 0)
    box: list = [None]
    dist.broadcast_object_list(box, src=leader, group=sequence.group)
    if box[0] is None:
        return None
    inputs: dict[str, dict[str, Tensor]] = {}
    for (kind, name), (shape, dtype) in box[0].items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=leader, group=sequence.group)
        inputs.setdefault(kind, {})[name] = tensor
    return inputs


def _flat(inputs: Inputs) -> dict[tuple[str, str], Tensor]:
    return {(kind, name): t.contiguous() for kind, tensors in inputs.items() for name, t in tensors.items()}
