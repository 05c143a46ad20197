"""Writes tensors in the background from where they are, and copies what an update would overwrite before it is written.

A save hands its tensors to the thread that writes them and goes on. Whoever wants to change them passes a door of the
booster (`guard`), and there `Background.secure` copies what was not written yet. When the writing ends before the next
update, nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.memory import LiveBytes
from opensora_like.checkpoint.pieces import Piece
from opensora_like.runtime import logger

# All ways to weights and moments, to change them or to get at views of them; the EMA walks over the masters when it
# averages. What else a booster has (`Booster`) changes nothing that is saved.
DOORS = ("step", "refresh", "master_shards", "optimizer_shards")


def guard(booster: Booster, before: Callable[[], None]) -> None:
    """Let `before` be called whenever somebody passes one of the booster's `DOORS`, from now on.

    Those of the boosters that a pair has are doors to the same tensors.
    """
    for owner in (booster, *getattr(booster, "parts", {}).values()):
        for door in DOORS:
            setattr(owner, door, _behind(before, getattr(owner, door)))


def _behind(before: Callable[[], None], door: Callable[[], Any]) -> Callable[[], Any]:
    @wraps(door)
    def guarded() -> Any:
        before()
        return door()

    return guarded


class Background:
    """What a save in the background still needs of the tensors that training goes on with.

    Host memory for copies is allocated when it is first needed and kept for the next save; pinned for what comes from a
    device. It is never more than this rank's part of the checkpoint.

    Args:
        stays: whether tensors in host memory are written from where they are; else they are copied as well.
    """

    def __init__(self, *, stays: bool) -> None:
        self._stays = stays
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._live: list[LiveBytes] = []
        self._said: set[str] = set()

    def begin(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces that `write_pieces` can write while training goes on."""
        self._live, begun, copied = [], [], 0
        for piece in pieces:
            tensor = piece.tensor.detach()
            buffer = partial(self._buffer, (piece.kind, piece.name), tensor.shape, tensor.dtype, pinned=tensor.is_cuda)
            if self._stays and tensor.device.type == "cpu" and tensor.is_contiguous():
                live = LiveBytes(f"{piece.kind} of {piece.name!r}", tensor, buffer)
                self._live.append(live)
                begun.append(piece._replace(tensor=live))
            else:
                begun.append(piece._replace(tensor=buffer().copy_(tensor, non_blocking=True)))
                copied += tensor.nbytes
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._say("async_io keeps %.1f MiB of host memory on this rank for the copy", copied)
        return begun

    def secure(self) -> None:
        """Copy all that was not written yet; what was handed to `begin` may change from now on."""
        live, self._live = self._live, []
        copied = sum(part.secure() for part in reversed(live))  # the writers come from the front
        text = "a step was shorter than the writing of a checkpoint: this rank keeps %.1f MiB for what was not written"
        self._say(text, copied)

    def release(self) -> None:
        """The save has ended."""
        self._live = []

    def _buffer(self, key: tuple[str, str], shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
            buffer = self._buffers[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return buffer

    def _say(self, text: str, num_bytes: int) -> None:
        """Once, where it is worth saying."""
        if num_bytes >= 2**20 and text not in self._said:
            self._said.add(text)
            logger.info(text, num_bytes / 2**20)
