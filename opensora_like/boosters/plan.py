"""Finds in a model what its `ParallelPlan` names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from opensora_like.models.base import ParallelPlan


def plan_of(model: nn.Module, *, where: str) -> ParallelPlan:
    """The model's plan.

    Raises:
        ValueError: it has none, or its blocks are not there.
    """
    if not hasattr(model, "parallel_plan"):
        raise ValueError(
            f"{where}: {type(model).__name__} has no parallel_plan(); use a denoiser, or booster.type='ddp'"
        )
    plan = model.parallel_plan()
    if not any(True for _ in modules_at(model, plan.blocks)):
        raise ValueError(f"{where}: {type(model).__name__} has none of the blocks {plan.blocks} of its own plan")
    return plan


def modules_at(model: nn.Module, patterns: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that a pattern names, in the order of the patterns; ``*`` is one index."""
    modules = dict(model.named_modules())
    for pattern in patterns:
        for name in names_at(modules, pattern):
            yield name, modules[name]


def names_at(names: Iterable[str], pattern: str) -> list[str]:
    """Those of `names` that `pattern` stands for."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if regex.fullmatch(name)]


def head_counts(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[nn.Module, str, str, int]]:
    """(module, attribute, their path, value) of every count of heads in the plan."""
    for path in plan.head_counts:
        pattern, _, attribute = path.rpartition(".")
        for name, module in modules_at(model, [pattern]):
            yield module, attribute, f"{name}.{attribute}", getattr(module, attribute)


def divisors(number: int) -> list[int]:
    """From 1 to `number`."""
    return [n for n in range(1, number + 1) if number % n == 0]
