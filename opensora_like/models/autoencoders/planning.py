"""Predicts what encoding or decoding a clip will take, without weights, memory or a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Usage:
    """What one call takes.

    Args:
        peak_bytes: most memory alive at once, on top of the weights and the input: results and intermediates between
            kernels. Work space inside a kernel and the allocator's reserve are not in it. On a CPU that work space is
            large for small tiles (unfolded convolutions): resident memory grew by 1.0 to 1.35 times this untiled, by
            3 to 4 times in tiles of 96 pixels. Not compared with a GPU.
        flops: multiplications and additions, each counted.
    """

    peak_bytes: int
    flops: int


def plan_encode(
    autoencoder: nn.Module,
    num_frames: int,
    height: int,
    width: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Usage:
    """Memory and work of ``autoencoder.encode`` for a clip, with the tiling that the autoencoder is set to.

    Args:
        autoencoder: built under ``torch.device("meta")``; its weights' dtype is that of the computation.
        num_frames, height, width: of the clip in pixels.
        dtype: of the clip.

    Raises:
        ValueError: the autoencoder is not on ``meta``, or cannot code this size.
    """
    _check_meta(autoencoder)
    video = torch.empty(batch_size, 3, num_frames, height, width, dtype=dtype, device="meta")
    return measure(lambda: autoencoder.encode(video))


def plan_decode(
    autoencoder: nn.Module,
    num_frames: int,
    height: int,
    width: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Usage:
    """As `plan_encode`, for ``decode``; the size is that of the clip in pixels."""
    _check_meta(autoencoder)
    z = torch.empty(batch_size, *autoencoder.latent_shape(num_frames, height, width), dtype=dtype, device="meta")
    return measure(lambda: autoencoder.decode(z))


def _check_meta(autoencoder: nn.Module) -> None:
    device = next(autoencoder.parameters()).device
    if device.type != "meta":
        raise ValueError(f"the autoencoder is on {str(device)!r}; build it under torch.device('meta') to plan with it")


def measure(call: Callable[[], Any]) -> Usage:
    """Run `call`, on any device, and count what it keeps alive and computes; nothing is saved for a backward pass."""
    live = _LiveBytes()
    with torch.no_grad(), FlopCounterMode(display=False) as flops, live:
        result = call()
    del result
    return Usage(peak_bytes=live.peak, flops=flops.get_total_flops())


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, counted=False)  # made before: weights and inputs
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._add(tensor, counted=True)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the identity of a storage on any device, also where it has no address
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known[key] = size
        self.now += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _tensors(tree: Any):
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
