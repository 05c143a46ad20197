"""Where the parts of a sampling run are: on the device, or in host memory until they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_use(module: nn.Module, device: torch.device, *, offload: bool) -> Iterator[None]:
    """With `offload`, `module` is on `device` within this context and on the CPU after it; else nothing moves."""
    if not offload:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")
