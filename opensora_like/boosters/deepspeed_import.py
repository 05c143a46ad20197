"""Imports DeepSpeed for the device at hand, quietly, and without the compiler it does not need here."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

INSTALL = "pip install -r requirements/deepspeed.txt"
# said by torch at each first call of two collectives; base.txt keeps torch below the version without them
RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


def import_deepspeed(device: torch.device) -> None:
    """Import ``deepspeed`` and let it join the process group that there is.

    Raises:
        ValueError: it, or something it needs, is not installed.
        RuntimeError: it was imported before, for another kind of device.
    """
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
    try:
        with environment(DS_ACCELERATOR=device.type):
            import deepspeed
            from deepspeed.accelerator import get_accelerator

            found = get_accelerator().device_name()
    except ImportError as problem:
        raise ValueError(
            f"booster.type='deepspeed' cannot be used: {problem}; {INSTALL}, or --booster.type ddp"
        ) from problem
    if found != device.type:
        raise RuntimeError(
            f"deepspeed was set up for {found!r}, the run is on {device.type!r}; unset DS_ACCELERATOR, and import "
            "deepspeed nowhere before the booster is built"
        )
    # Asked by one caller only: may it compile an all-reduce for inference on CPUs, on all ranks at once? No.
    deepspeed.ops.__compatible_ops__ = {}
    # It reads these until the end, also where no launcher has set them; without the second it starts a program
    # that counts CPUs in every backward of stage 3.
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    logging.getLogger("DeepSpeed").addFilter(_not_about_our_optimizers)
    deepspeed.init_distributed(verbose=False)  # finds the group of opensora_like.runtime, and makes none


def _not_about_our_optimizers(record: logging.LogRecord) -> bool:
    """Drops the advice against optimizers that DeepSpeed has not tested, such as SGD: here they are."""
    return "untested optimizer" not in record.getMessage()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables that are set here, where they are not set already, for as long as the context is open."""
    absent = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]
