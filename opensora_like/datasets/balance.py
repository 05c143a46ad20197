"""Reorders the micro-batches of an epoch so that those of one step cost the same, and weighs them in the loss."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from opensora_like.datasets.lazy import Column, Pieces
from opensora_like.datasets.plan import EpochPlan, Position, steps_in_epoch
from opensora_like.rng import uniform

LossWeight = Literal["per_micro_batch", "per_sample", "per_token"]


@dataclass(frozen=True, eq=False)
class Balance:
    """How micro-batches are laid side by side. Neither number of ranks nor of accumulation rounds is in it.

    Args:
        costs: float64 [buckets], of one micro-batch; see `CostModel`.
        window: micro-batches that are sorted together, a multiple of `group`. The mix of an epoch is that of the
            random order over every window; a large window makes steps of equal cost, a small one changes
            the kind of data more often.
        group: micro-batches of like cost that stay together, in order of cost. A step of K micro-batches is
            balanced where K divides `group`; where it does not, the steps that straddle two groups are not.

    Raises:
        ValueError: numbers below 1, or a window that is no multiple of the group.
    """

    costs: np.ndarray
    window: int = 4096
    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 1 or self.window < self.group or self.window % self.group:
            raise ValueError(
                f"balance.window={self.window!r} must be a multiple of balance.group={self.group!r}, both 1 or more"
            )

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the order; the unit of the costs does not."""
        digest = hashlib.blake2b(f"{self.window}/{self.group}/".encode(), digest_size=8)
        digest.update(self._ranks().astype(np.int64))
        return digest.hexdigest()

    @property
    def key(self) -> dict[str, Any]:
        """For `plan.order_key`."""
        return {"window": self.window, "group": self.group, "cost": self.fingerprint}

    def _ranks(self) -> np.ndarray:
        """Place of each bucket by cost; equal costs share one, so that the random order decides there."""
        places = np.unique(self.costs, return_inverse=True)[1]
        return places.astype(np.uint16 if len(places) < 2**16 else np.int64)  # 16 bits are sorted by counting


def balance_plan(plan: EpochPlan, balance: Balance, *, seed: int) -> EpochPlan:
    """The same micro-batches in an order in which runs of `balance.group` cost nearly the same.

    Windows of the plan's random order are sorted by cost and cut into groups; the groups of a window come in
    random order. What does not fill a group is at the end, in runs of 2^k as large as possible, sorted each;
    which micro-batches these are is random, so that those which no longer fill a step are of no special cost.

    Args:
        plan: with its micro-batches in random order, not from bucket to bucket.
    """
    fingerprint = hashlib.blake2b(f"{plan.fingerprint}/{balance.fingerprint}".encode(), digest_size=16).hexdigest()

    if isinstance(plan.starts, Column):
        pieces = Pieces(len(plan), balance.window, _Balanced(plan, balance, seed))
        return replace(plan, starts=pieces.column(0), bucket_ids=pieces.column(1), fingerprint=fingerprint)
    order = balanced_order(balance._ranks()[plan.bucket_ids], balance, seed=seed, epoch=plan.epoch)
    return replace(plan, starts=plan.starts[order], bucket_ids=plan.bucket_ids[order], fingerprint=fingerprint)


@dataclass(frozen=True, eq=False)
class _Balanced:
    """Computes windows of a balanced plan; a window depends on no other."""

    plan: EpochPlan
    balance: Balance
    seed: int

    def __call__(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        starts, bucket_ids = self.plan.starts[first:last], self.plan.bucket_ids[first:last]
        cost = self.balance._ranks()[bucket_ids]
        order = balanced_order(cost, self.balance, seed=self.seed, epoch=self.plan.epoch, first=first)
        return starts[order], bucket_ids[order]


def balanced_order(cost: np.ndarray, balance: Balance, *, seed: int, epoch: int, first: int = 0) -> np.ndarray:
    """Where to take each micro-batch from.

    Args:
        cost: numbers [N]. first: number of the first of them in the epoch, a multiple of the window.

    Returns: int64 [N], a permutation.
    """
    group, num = balance.group, len(cost)
    in_groups = num - num % group
    in_windows = in_groups - in_groups % balance.window
    order = np.empty(num, np.int64)
    for begin, end, size in ((0, in_windows, balance.window), (in_windows, in_groups, in_groups - in_windows)):
        if begin == end:
            continue
        by_cost = np.argsort(cost[begin:end].reshape(-1, size), axis=1, kind="stable")
        by_cost += np.arange(begin, end, size)[:, None]
        groups = by_cost.reshape(len(by_cost), -1, group)
        draw = uniform(seed, "balance.groups", epoch, np.arange((first + begin) // group, (first + end) // group))
        shuffled = np.argsort(draw.reshape(groups.shape[:2]), axis=1, kind="stable")
        order[begin:end] = np.take_along_axis(groups, shuffled[:, :, None], axis=1).ravel()
    start = in_groups
    for bit in reversed(range(group.bit_length())):  # aligned runs: a tail of 41 is 32 + 8 + 1
        if (num - in_groups) >> bit & 1:
            run = cost[start : start + (1 << bit)]
            order[start : start + len(run)] = start + np.argsort(run, kind="stable")
            start += len(run)
    return order


def utilisation(plan: EpochPlan, costs: np.ndarray, *, world_size: int, accumulation: int = 1) -> float:
    """Share of the ranks' time that is work, if all wait for the slowest at the end of each step; 1 is perfect.

    Args:
        costs: float64 [buckets], of one micro-batch.
    """
    steps = steps_in_epoch(len(plan), world_size * accumulation)
    if not steps:
        raise ValueError(f"a plan of {len(plan)} micro-batches has no step of {world_size} * {accumulation} of them")
    used = costs[plan.bucket_ids[: steps * world_size * accumulation]]
    per_rank = used.reshape(steps, accumulation, world_size).sum(axis=1)
    return float(per_rank.sum() / (world_size * per_rank.max(axis=1).sum()))


def micro_batch_weight(
    plan: EpochPlan, position: Position, micro_per_step: int, mode: LossWeight, *, tokens: np.ndarray | None = None
) -> np.ndarray:
    """What the mean loss of each micro-batch of a step is multiplied with, before their plain mean is taken.

    "per_micro_batch" counts a batch of 2 long clips as much as one of 130 images, as Open-Sora does;
    "per_sample" makes the step's loss the mean over its samples, "per_token" that over its latent tokens.
    Micro-batch m * dp_size + r of the step belongs to rank r in round m.

    Args:
        position: where the step begins, in the epoch of `plan`.
        micro_per_step: dp_size * accumulation.
        tokens: int64 [buckets], of one sample, see `tokens_of`; needed by "per_token" only.

    Returns: float64 [micro_per_step], of mean 1.

    Raises:
        ValueError: no such mode, no `tokens`, another epoch, or a step that reaches over the end of the plan.
    """
    if position.epoch != plan.epoch or not 0 <= position.micro_batch <= len(plan) - micro_per_step:
        raise ValueError(
            f"a step of {micro_per_step} micro-batches at {tuple(position)} is not in the plan of epoch {plan.epoch}, "
            f"which has {len(plan)}"
        )
    bucket_ids = plan.bucket_ids[position.micro_batch : position.micro_batch + micro_per_step]
    if mode == "per_micro_batch":
        return np.ones(micro_per_step)
    if mode not in ("per_sample", "per_token"):
        raise ValueError(f"loss_weight={mode!r} is not one of 'per_micro_batch', 'per_sample', 'per_token'")
    counts = plan.buckets.batch_sizes[bucket_ids].astype(np.float64)
    if mode == "per_token":
        if tokens is None:
            raise ValueError("loss_weight='per_token' needs the tokens of each bucket")
        counts *= tokens[bucket_ids]
    return counts / counts.mean()
