"""Copies batches to the GPU while it is still busy with the batch before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from opensora_like.datasets.batch import Batch


class DeviceFeed:
    """Gives batches whose tensors are on `device`; the copy of the next one is under way by then.

    Copies run on a stream of their own and read page-locked memory, which torch keeps for reuse: the loader lives as
    long as the run, so after the first batches of each size nothing is locked anew. An error of the loader is raised
    when its batch is asked for, not one batch early.

    Args:
        batches: in page-locked memory where `device` is a GPU.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        found = self._ahead if self._ahead is not None else self._fetch()
        if isinstance(found, Exception):
            raise found
        if self._stream is not None:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_stream(self._stream)
            for tensor in found.tensors():  # or its memory could be given away while the step still reads it
                tensor.record_stream(compute)
        self._ahead = self._fetch()
        return found

    def _fetch(self) -> Batch | Exception:
        try:
            batch = next(self._batches)
        except Exception as problem:  # noqa: BLE001 - kept, and raised in its turn
            return problem
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return batch.to(self._device)
