"""Lets ColossalAI's ZeRO run without an accelerator; nothing here is used on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class CpuDevice:
    """What ColossalAI asks of a device, answered for the CPU: its own class for it raises instead.

    A device that runs everything in order has nothing to wait for, no streams and no cache, so these calls
    do nothing. Mixed into ColossalAI's class by `install`.
    """

    support_set_device = True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: torch.device | int | None = None) -> None: ...

    def device_count(self) -> int:
        return 1

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def reset_max_memory_allocated(self, device: Any = None) -> None: ...

    def reset_max_memory_cached(self, device: Any = None) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return self.memory_reserved(device)

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.max_memory_reserved(device)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def get_rng_state_all(self) -> list[Tensor]:
        return [torch.get_rng_state()]

    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def set_rng_state_all(self, new_states: list[Tensor]) -> None:
        torch.set_rng_state(new_states[0])

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def seed(self) -> None:
        torch.seed()

    def seed_all(self) -> None:
        torch.seed()

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def Stream(self, device: Any = None, priority: int = 0) -> torch.cpu.Stream:
        return torch.cpu.Stream()

    def Event(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.cpu.Event:
        return torch.cpu.Event(enable_timing=enable_timing)

    def current_stream(self, device: Any = None) -> torch.cpu.Stream:
        return torch.cpu.current_stream()

    def default_stream(self, device: Any = None) -> torch.cpu.Stream:
        return torch.cpu.current_stream()

    def set_stream(self, stream_: Any) -> None: ...

    def stream(self, stream_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def autocast(
        self, enabled: bool = True, dtype: torch.dtype = torch.bfloat16, cache_enabled: bool = True
    ) -> torch.autocast:
        return torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


def install() -> None:
    """Make the CPU ColossalAI's device in this process; once is enough, more does no harm.

    Besides the device, one check is replaced: ZeRO asserts a GPU before it compares dtypes.
    """
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.zero import LowLevelZeroOptimizer

    set_accelerator(type("CpuAccelerator", (CpuDevice, CpuAccelerator), {})())
    LowLevelZeroOptimizer._sanity_checks = _check_dtypes


def _check_dtypes(zero: Any) -> None:
    """All parameters of a ZeRO optimizer have its dtype, unless they carry ``skip_zero_check``."""
    for group in zero.optim.param_groups:
        for parameter in group["params"]:
            if parameter.dtype != zero._dtype and not getattr(parameter, "skip_zero_check", False):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}, the first one {zero._dtype}; "
                    "give ZeRO parameters of one dtype"
                )
