"""Cuts frozen T5 encoders over the ranks that share a sample, so that none of them holds a whole one."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from opensora_like.boosters.plan import modules_at
from opensora_like.boosters.tensor_parallel import TensorCut, apply_tensor_parallelism
from opensora_like.models.base import ParallelPlan

ATTENTION = "encoder.block.*.layer.0.SelfAttention"
MLP = "encoder.block.*.layer.1.DenseReluDense"
# of T5, mT5 and umT5 alike; an MLP has `wi`, or `wi_0` and `wi_1` where it is gated
PLAN = ParallelPlan(
    blocks=("encoder.block.*",),
    attention=(ATTENTION,),
    column={**{f"{ATTENTION}.{n}": () for n in ("q", "k", "v")}, **{f"{MLP}.{n}": () for n in ("wi", "wi_0", "wi_1")}},
    row={f"{ATTENTION}.o": (), f"{MLP}.wo": ()},
    head_counts=(f"{ATTENTION}.n_heads", f"{ATTENTION}.inner_dim"),
)


def cut_t5(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Cut a T5 encoder of transformers in place: linears, and the table of relative positions by heads.

    All ranks of the group have to encode the same captions in the same order. Token embeddings and norms stay whole.

    Args:
        model: frozen, whole and equal on all ranks.

    Raises:
        ValueError: not a T5 encoder, or heads or widths that the group's size does not divide.

    Source: hpcaitech/Open-Sora, shardformer for T5.
    """
    if not any(True for _ in modules_at(model, [ATTENTION])):
        raise ValueError(f"text encoder with tp=True: {type(model).__name__} has no blocks of T5; set tp=False")
    apply_tensor_parallelism(model, PLAN, group)
    for _, attention in modules_at(model, [ATTENTION]):
        if attention.has_relative_attention_bias:
            _cut_positions(attention.relative_attention_bias, group)


def _cut_positions(table: nn.Embedding, group: dist.ProcessGroup) -> None:
    whole = table.weight.detach()
    cut = TensorCut(tuple(whole.shape), 1, (whole.shape[1],), dist.get_rank(group), dist.get_world_size(group))
    table.weight = nn.Parameter(cut.take(whole), requires_grad=table.weight.requires_grad)
    table.embedding_dim = table.weight.shape[1]
