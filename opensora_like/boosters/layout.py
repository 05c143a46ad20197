"""How parameters are cut over ranks: even ranges of each flattened tensor, and the ways between part and whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters.base import ShardRange


def ranks(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, size) in `group`, None being all ranks; (0, 1) where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def even_range(shape: torch.Size | tuple[int, ...], rank: int, world_size: int) -> ShardRange:
    """The part of a tensor of `shape` that `rank` owns: all parts are of one length but the last ones.

    ColossalAI's ZeRO cuts in the same way, once its padding is taken off.
    """
    total = math.prod(shape)
    length = part_length(total, world_size)
    return ShardRange(tuple(shape), min(rank * length, total), min((rank + 1) * length, total))


def part_length(total: int, world_size: int) -> int:
    """Elements in a full part of a tensor of `total` elements."""
    return -(-total // world_size)


def check_trainable(model: nn.Module, *, where: str) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, each once.

    Raises:
        ValueError: there are none.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{where}: the model has no parameter with requires_grad; unfreeze one")
    return trainable


def materialize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on ``meta`` zeros of `dtype` on `device`, to be overwritten by a load; any other stays as it is.

    Raises:
        ValueError: a frozen parameter or a buffer is on ``meta``: no load would ever fill it.
    """
    for _ in materialize_in_turn(model, device, dtype):
        pass


def materialize_in_turn(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Parameter]:
    """All parameters one after another, each once; one on ``meta`` is replaced when it is asked for, see `materialize`.

    Who cuts each of them before he asks for the next never has more than one whole.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lost := [name for name, t in tensors if t.is_meta and not t.requires_grad]:
        raise ValueError(
            f"{len(lost)} frozen tensors on meta, {lost[:3]}; checkpoints hold trainable ones only; load them first"
        )
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # one that two modules share stays shared
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    for parameter, places in owners.items():
        made = parameter
        if parameter.is_meta:
            made = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
            for module, name in places:
                setattr(module, name, made)
        yield made


def make_contiguous(parameters: Iterable[nn.Parameter]) -> None:
    """Lay parameters out row by row in place, so that their flattened forms are views."""
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()


def fill_from_parts(whole: Tensor, start: int, stop: int, *, group: dist.ProcessGroup | None = None) -> None:
    """Make `whole`, contiguous, equal on all ranks, each of which holds the truth in [start, stop) of it, flattened.

    Args:
        group: the ranks; None is all. Their parts are those of `even_range`.
    """
    world_size = ranks(group)[1]
    if world_size == 1:
        return
    flat = whole.view(-1)
    length = part_length(flat.numel(), world_size)
    own = flat.new_zeros(length)
    own[: stop - start] = flat[start:stop]
    parts = flat.new_empty(world_size, length)
    dist.all_gather(list(parts), own, group=group)
    flat.copy_(parts.view(-1)[: flat.numel()])


def buckets(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Lists of neighbours of `most` elements in all, or of one tensor that has more."""
    found: list[Tensor] = []
    for tensor in tensors:
        if found and sum(t.numel() for t in found) + tensor.numel() > most:
            yield found
            found = []
        found.append(tensor)
    if found:
        yield found


def gather_whole(shards: Mapping[str, Tensor], ranges: Mapping[str, ShardRange]) -> dict[str, Tensor]:
    """Whole tensors on rank 0 from even parts; every rank calls it with the same names in the same order.

    Args:
        shards: flat, of the length that `ranges` says; a tensor without dimension is the same on all ranks.

    Returns: CPU copies in their shapes; {} except on rank 0.
    """
    rank, world_size = ranks()
    whole = {}
    for name, shard in shards.items():
        shard = shard.detach()
        if shard.ndim and world_size > 1:
            flat = _gather_flat(shard, math.prod(ranges[name].shape), rank, world_size)
        else:
            flat = shard
        if rank == 0:
            shape = ranges[name].shape if shard.ndim else ()
            whole[name] = flat.to("cpu", copy=True).reshape(shape)
    return whole


def _gather_flat(shard: Tensor, total: int, rank: int, world_size: int) -> Tensor:
    """All parts joined, on rank 0; elsewhere something without meaning."""
    length = part_length(total, world_size)
    own = shard.new_zeros(length)
    own[: shard.numel()] = shard
    parts = shard.new_empty(world_size if rank == 0 else 0, length)
    dist.gather(own, list(parts) if rank == 0 else None, dst=0)
    return parts.view(-1)[:total]
