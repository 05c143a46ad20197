"""Keeps what the forward saved for the backward in host memory in between."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook

MIN_SIZE = 1 << 16  # bytes; smaller storages are not worth a copy
ALIGNMENT = 512  # bytes; where copies by DMA begin
IN_FLIGHT = 2  # copies to the host that hold device memory while the forward goes on
AHEAD = 2  # copies to the device that run ahead of the backward


class _Place(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _OfParameter(NamedTuple):
    """A view of a parameter: backends free and refill its storage, or give it another."""

    parameter: nn.Parameter
    place: _Place


class _Storage:
    """A storage in the buffer, and on the device again once it was fetched; it lives as long as the graph wants it."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class _Saved(NamedTuple):
    """One tensor that the graph saved."""

    storage: _Storage
    place: _Place
    order: int


class ActivationOffload:
    """A host buffer, filled in the forward and emptied in the backward.

    Storages are copied whole and once, however many tensors of them are saved, and come back with the same strides:
    results are the same bit by bit. Parameters stay where they are. With gradient checkpointing what is saved are the
    inputs of the blocks. What the buffer has no room for stays on the device.

    On CUDA copies run beside the computation, two at a time in each direction. Under autocast copies of weights in the
    lower precision are saved as well, and take room in the buffer as activations do.

    Args:
        buffer_size: bytes of host memory, pinned on CUDA; taken at the first forward.
        device: what the forward runs on; tensors elsewhere are left alone.
        min_size: bytes of the smallest storage worth a copy.

    Raises:
        ValueError: a size below 1.

    Source: the activation offload of hpcaitech/Open-Sora, which counts elements and stops where its buffer is full.
    """

    def __init__(self, buffer_size: int, device: torch.device, *, min_size: int = MIN_SIZE) -> None:
        if buffer_size < 1:
            raise ValueError(f"grad_ckpt_buffer_size={buffer_size} must be 1 byte or more; 0 in a config is off")
        self._size, self._device, self._min_size = buffer_size, torch.device(device), min_size
        self._buffer: Tensor | None = None
        self._used = self._live = self._count = 0
        self._by_order: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._entered: list[nn.Module] = []
        self._parameters: dict[int, nn.Parameter] = {}
        self._known: dict[int, tuple[StorageWeakRef, int, _Storage, int]] = {}
        self.copied_bytes = self.kept_bytes = 0  # of the last forward: to the host, and left for want of room

    @property
    def used_bytes(self) -> int:
        """Of the buffer, by graphs that are alive."""
        return self._used

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around a forward; its backward is outside."""
        self.copied_bytes = self.kept_bytes = 0
        hook = register_module_forward_pre_hook(lambda module, args: self._entered.append(module))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            hook.remove()
            while self._leaving:
                self._await_oldest()
            self._entered.clear()
            self._parameters.clear()
            self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _OfParameter | _Saved:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return tensor
        if tensor.device.type != self._device.type:
            return tensor
        storage = tensor.untyped_storage()
        place = _Place(tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())
        parameter = self._parameter_of(storage)
        if parameter is not None:
            return _OfParameter(parameter, place) if parameter.dtype == tensor.dtype else tensor
        if storage.nbytes() < max(self._min_size, 1):
            return tensor
        # the weak reference keeps the key from being given to another storage
        known = self._known.get(storage._cdata)
        if known is not None and not known[0].expired() and known[1] == tensor._version:
            return _Saved(known[2], place, known[3])
        copied = self._copy_out(storage)
        if copied is None:
            self.kept_bytes += storage.nbytes()
            return tensor
        order, self._count = self._count, self._count + 1
        self._by_order[order] = copied
        self._known[storage._cdata] = (StorageWeakRef(storage), tensor._version, copied, order)
        return _Saved(copied, place, order)

    def _parameter_of(self, storage: torch.UntypedStorage) -> nn.Parameter | None:
        for module in self._entered:  # late: sharded backends gather weights after a module was entered
            for parameter in module._parameters.values():
                if parameter is not None and not isinstance(parameter, DTensor):
                    self._parameters[parameter.untyped_storage()._cdata] = parameter
        self._entered.clear()
        found = self._parameters.get(storage._cdata)
        # it may have got another storage since, and this one be new at an old address
        return found if found is not None and found.untyped_storage()._cdata == storage._cdata else None

    def _copy_out(self, storage: torch.UntypedStorage) -> _Storage | None:
        begin, size = self._used, storage.nbytes()
        if begin + size > self._size:
            return None
        if self._buffer is None:
            self._buffer = _host_buffer(self._size, pinned=self._side is not None)
        here = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        copied = _Storage(self._buffer[begin : begin + size], storage.device)
        if self._side is None:
            copied.host.copy_(here)
        else:
            while len(self._leaving) >= IN_FLIGHT:
                self._await_oldest()
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                copied.host.copy_(here, non_blocking=True)
            self._leaving.append((self._side.record_event(), here))
        self._used = begin + -(-size // ALIGNMENT) * ALIGNMENT
        self._live += 1
        self.copied_bytes += size
        weakref.finalize(copied, self._forget).atexit = False
        return copied

    def _await_oldest(self) -> None:
        """Let go of the device memory of a copy; what computes next may be given it."""
        event, _ = self._leaving.popleft()
        torch.cuda.current_stream(self._device).wait_event(event)

    def _forget(self) -> None:
        self._live -= 1
        if not self._live:  # a stack: room comes back when the last graph that uses the buffer has gone
            self._used = 0

    def _unpack(self, packed: Tensor | _OfParameter | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        place = packed.place
        if isinstance(packed, _OfParameter):
            return packed.parameter.detach().as_strided(place.size, place.stride, place.offset)
        storage = packed.storage
        self._fetch(storage)
        if self._side is not None:
            for order in range(packed.order - 1, packed.order - 1 - AHEAD, -1):  # the backward goes in reverse
                if (following := self._by_order.get(order)) is not None:
                    self._fetch(following)
            torch.cuda.current_stream(self._device).wait_event(storage.arrived)
        whole = storage.back.untyped_storage()
        view = torch.empty(0, dtype=place.dtype, device=storage.device)
        return view.set_(whole, place.offset, place.size, place.stride)

    def _fetch(self, storage: _Storage) -> None:
        if storage.back is not None:
            return
        storage.back = torch.empty(len(storage.host), dtype=torch.uint8, device=storage.device)
        if self._side is None:
            storage.back.copy_(storage.host)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            storage.back.copy_(storage.host, non_blocking=True)
        storage.back.record_stream(self._side)  # a graph that is dropped frees it without having waited
        storage.arrived = self._side.record_event()


def build_offload(buffer_size: int, device: torch.device) -> ActivationOffload | None:
    """What `grad_ckpt_buffer_size` asks for, in bytes; None for 0.

    Raises:
        ValueError: below 0.
    """
    if buffer_size < 0:
        raise ValueError(f"grad_ckpt_buffer_size={buffer_size} must be 0 (off) or bytes of host memory per rank")
    return ActivationOffload(buffer_size, device, min_size=MIN_SIZE) if buffer_size else None


def _host_buffer(size: int, *, pinned: bool) -> Tensor:
    """Bytes in host memory. torch's own pinned allocator would round them up to a power of two."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if pinned:
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(code):
            raise RuntimeError(f"grad_ckpt_buffer_size={size}: cannot pin so many bytes (CUDA error {int(code)})")
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer
