"""Runs an autoencoder over parts of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def resolve_mini_batch(mini_batch_size: int | None, *, use_slicing: bool) -> int | None:
    """Samples per run; None is all.

    Raises:
        ValueError: less than one, or a size that contradicts `use_slicing`.
    """
    if mini_batch_size is not None and mini_batch_size < 1:
        raise ValueError(f"autoencoder.mini_batch_size={mini_batch_size} must be at least 1, or None for all")
    if use_slicing and mini_batch_size not in (None, 1):
        raise ValueError(
            f"autoencoder.mini_batch_size={mini_batch_size} contradicts use_slicing=True, which means 1; "
            "give one of them"
        )
    return 1 if use_slicing else mini_batch_size


def run_by_samples(run: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """`run` over at most `size` samples at a time."""
    if size is None or x.shape[0] <= size:
        return run(x)
    return torch.cat([run(part) for part in x.split(size)])
