"""Imports ColossalAI without two packages that it asks for and that nothing here uses, and leaves torch as it was."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# galore_torch (optimizers) needs bitsandbytes (60 MB of CUDA code); ColossalAI imports both, always
OPTIONAL = ("galore_torch", "bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
NAGGING = (  # about packages that we do not need; matched against the start of the message
    "Please install the latest tensornvme",
    "Please install apex from source",
)
# torch says so of two collectives at each first call; base.txt keeps torch below the version without them
RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
# puts kernels of torch 1.12 for tensors on meta in the place of torch's own, in the whole process; their backward of a
# layer norm without bias fails
STALE_KERNELS = "colossalai._analyzer._subclasses._meta_registration"
INSTALL = "pip install --no-deps -r requirements/colossalai.txt"


def import_colossalai(where: str = "booster.type='colossalai'", instead: str = "--booster.type ddp") -> None:
    """Import ``colossalai.booster`` and its plugins, so that later imports find them.

    Args:
        where, instead: the setting that asks for it, and another one, for the error.

    Raises:
        ValueError: it, or something it needs, is not installed.
    """
    if "colossalai.booster.plugin" in sys.modules:
        return
    try:
        import peft  # noqa: F401  # first: it looks for the real bitsandbytes, and remembers
        import transformers  # noqa: F401

        sys.modules.setdefault(STALE_KERNELS, types.ModuleType(STALE_KERNELS))  # for good: it is imported in two places
        with warnings.catch_warnings(), stand_ins():
            for message in NAGGING:
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            import colossalai.booster.plugin  # noqa: F401
    except ImportError as problem:
        raise ValueError(f"{where} cannot be used: {problem}; {INSTALL}, or {instead}") from problem
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Placeholders for those of `OPTIONAL` that are not installed, as long as the context is open.

    They go afterwards: libraries that ask whether bitsandbytes is there must get the right answer.
    """
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in absent:
        sys.modules[name] = _placeholder(name)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _placeholder(module_name: str) -> types.ModuleType:
    """A module in which every name is a class that cannot be instantiated."""
    module = types.ModuleType(module_name)

    def attribute(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

        def refuse(self: object, *args: object, **settings: object) -> None:
            raise ImportError(f"{module_name}.{name} was asked for, but {module_name!r} is not installed; install it")

        return type(name, (), {"__init__": refuse, "__module__": module_name})

    module.__getattr__ = attribute
    return module
