"""The memory of tensors as bytes: at rest, or written to a file while training is about to change it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from torch import Tensor

TAIL = 64  # bytes of a tensor by which a change is noticed


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, flat; live."""
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))


class Overwritten(RuntimeError):
    """A tensor changed while it was saved: somebody wrote to it who had not let it be secured before."""


class LiveBytes:
    """A contiguous CPU tensor that is written front to back by one thread, while another may be about to change it.

    Args:
        spare: gives memory of the tensor's shape, when some is needed.
    """

    def __init__(self, name: str, tensor: Tensor, spare: Callable[[], Tensor]) -> None:
        self.dtype, self.shape, self.nbytes = tensor.dtype, tensor.shape, tensor.nbytes
        self._name, self._spare = name, spare
        self._memory = np.frombuffer(bytes_of(tensor), np.uint8) if tensor.nbytes else np.empty(0, np.uint8)
        self._tail = self._memory[-TAIL:].tobytes()
        self._taken, self._lock = 0, Lock()

    def take(self, into: memoryview) -> None:
        """Fill `into` with the bytes that come next.

        Raises:
            Overwritten: the last bytes of the tensor are not those that it was made with.
        """
        with self._lock:
            end = self._taken + into.nbytes
            np.copyto(np.frombuffer(into, np.uint8), self._memory[self._taken : end])  # without the interpreter's lock
            self._taken = end
            if end == self.nbytes and self._memory[-TAIL:].tobytes() != self._tail:
                raise Overwritten(f"{self._name} was changed while it was saved, past the doors in checkpoint/live.py")

    def secure(self) -> int:
        """Copy what was not taken yet. Returns: bytes."""
        with self._lock:
            left = self.nbytes - self._taken
            if left:
                copy, first = np.frombuffer(bytes_of(self._spare()), np.uint8), min(self._taken, self.nbytes - TAIL)
                np.copyto(copy[max(first, 0) :], self._memory[max(first, 0) :])  # the tail whole: it is compared
                self._memory = copy
            return left
