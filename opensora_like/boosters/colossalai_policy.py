"""A ColossalAI shardformer policy for any denoiser, made from its `ParallelPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from opensora_like.boosters.colossalai_layout import Groups
from opensora_like.boosters.colossalai_options import SPLIT_GATHER, WHERE
from opensora_like.boosters.plan import divisors, head_counts, modules_at, plan_of
from opensora_like.boosters.sequence_parallel import apply_sequence_parallelism
from opensora_like.boosters.split_gather import apply_split_gather, check_streams
from opensora_like.boosters.tensor_parallel import TensorCut, mean_over_group
from opensora_like.models.base import ParallelPlan

TYPE = "booster.type='colossalai'"


def check_heads(model: nn.Module, *, tp_size: int, sp_size: int, mode: str) -> None:
    """Check that the groups share the model's heads evenly.

    Raises:
        ValueError: they do not; or the model has no plan, or no seam to cut its tokens.
    """
    if tp_size * sp_size == 1:
        return
    plan = plan_of(model, where=TYPE)
    if mode == SPLIT_GATHER:
        check_streams(model, plan, where=f"{WHERE}.sequence_parallelism_mode={mode!r}")
    if sp_size > 1 and not hasattr(model, "sequence_cut"):
        raise ValueError(
            f"{WHERE}.sp_size={sp_size}: {type(model).__name__} cannot cut its sequence (no sequence_cut); use 1"
        )
    for _, _, path, heads in head_counts(model, plan):
        if heads % tp_size:
            raise ValueError(
                f"{WHERE}.tp_size={tp_size} does not divide the {heads} heads of {path}; use one of {divisors(heads)}"
            )
        here = heads // tp_size
        if mode == "all_to_all" and here % sp_size:
            shared = f"{heads} heads" if tp_size == 1 else f"{here} heads that tp_size={tp_size} leaves"
            raise ValueError(
                f"{WHERE}.sp_size={sp_size} does not divide the {shared} of {path}; use one of {divisors(here)}, or"
                f" {WHERE}.sequence_parallelism_mode='ring_attn'"
            )


def find_cuts(model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, TensorCut]:
    """How each parameter that the plan cuts is to be cut, by name; {} without a group.

    Raises:
        ValueError: a width that the group's size does not divide, or what is to be cut is not an ``nn.Linear``.
    """
    if group is None:
        return {}
    plan = plan_of(model, where=TYPE)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cuts: dict[str, TensorCut] = {}
    for dim, linears in enumerate((plan.column, plan.row)):
        for pattern, parts in linears.items():
            for name, linear in modules_at(model, [pattern]):
                if type(linear) is not nn.Linear:
                    raise ValueError(
                        f"{WHERE}.tp_size={size}: {name} is a {type(linear).__name__}, only nn.Linear can be cut"
                        f" (adapters cannot); use {WHERE}.tp_size=1"
                    )
                sizes = parts or (linear.weight.shape[dim],)
                cut = TensorCut(tuple(linear.weight.shape), dim, tuple(sizes), rank, size)
                cuts[f"{name}.weight"] = _checked(name, cut)
                if dim == 0 and linear.bias is not None:
                    cuts[f"{name}.bias"] = cut._replace(shape=tuple(linear.bias.shape))
    for name, norm in modules_at(model, plan.split_norms):
        shape = tuple(norm.weight.shape)
        cuts[f"{name}.weight"] = _checked(name, TensorCut(shape, 0, shape, rank, size))
    return cuts


def _checked(name: str, cut: TensorCut) -> TensorCut:
    assert sum(cut.sizes) == cut.shape[cut.dim], f"plan of {name}: parts {cut.sizes} of {cut.shape}"
    if uneven := [part for part in cut.sizes if part % cut.size]:
        raise ValueError(
            f"{WHERE}.tp_size={cut.size} does not divide the part of {uneven[0]} of {name}; use one of"
            f" {divisors(uneven[0])}"
        )
    return cut


def build_policy(cuts: Mapping[str, TensorCut], groups: Groups) -> Any:
    """The policy that cuts a model as its plan and `cuts` say.

    Linears become ColossalAI's ``FusedLinear1D_Col`` and ``FusedLinear1D_Row``, which know parts (a plain linear has
    one), and counts of heads are replaced, both by its sharder. Norms over a cut width, and sequence parallelism,
    are our own: ColossalAI has neither in a form that does not depend on the model.
    """
    from colossalai.shardformer.layer import FusedLinear1D_Col, FusedLinear1D_Row
    from colossalai.shardformer.policies.base_policy import (
        ModulePolicyDescription,
        Policy,
        SubModuleReplacementDescription,
    )

    class PlanPolicy(Policy):
        """See `build_policy`."""

        def config_sanity_check(self) -> None:
            """Everything is checked by then, by names that the config has."""

        def preprocess(self) -> nn.Module:
            return self.model

        def module_policy(self) -> dict[type, Any]:
            if groups.tensor is None:
                return {}
            plan = plan_of(self.model, where=TYPE)
            replaced = [
                SubModuleReplacementDescription(name, layer, {"split_sizes": list(cuts[f"{name}.weight"].sizes)})
                for layer, linears in ((FusedLinear1D_Col, plan.column), (FusedLinear1D_Row, plan.row))
                for name, _ in modules_at(self.model, linears)
            ]
            size = groups.tensor_size
            counts = {path: heads // size for _, _, path, heads in head_counts(self.model, plan)}
            # paths start at the model, so its class is the only one to describe
            return {
                type(self.model): ModulePolicyDescription(attribute_replacement=counts, sub_module_replacement=replaced)
            }

        def postprocess(self) -> nn.Module:
            if groups.tensor is not None:
                _cut_norms(self.model, plan_of(self.model, where=TYPE), cuts, groups.tensor)
            if groups.tokens_follow_linears:
                apply_split_gather(self.model, plan_of(self.model, where=TYPE), groups.sequence)
            elif groups.sequence is not None:
                apply_sequence_parallelism(self.model, groups.sequence)
            return self.model

    return PlanPolicy()


def _cut_norms(model: nn.Module, plan: ParallelPlan, cuts: Mapping[str, TensorCut], group: dist.ProcessGroup) -> None:
    """Give each norm over a cut width its part of the weights and the mean over all of the width."""
    for name, norm in modules_at(model, plan.split_norms):
        norm.weight.data = cuts[f"{name}.weight"].take(norm.weight.detach())
        norm.mean_over_ranks = partial(mean_over_group, group=group)
