"""Compiles what a step runs again and again: the denoiser's blocks, and the networks of the autoencoder."""

from __future__ import annotations

import torch
from torch import nn

from opensora_like.boosters.plan import modules_at, plan_of
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.registry import nearest
from opensora_like.settings import RunConfig

NETWORKS = ("encoder", "decoder")  # of an autoencoder; tiling and slicing around them stay as they are
# of one function. torch's own 8 do not hold the first block and the others, one sample, two or more, lengths that vary,
# and forwards with and without gradients; what comes after them would run uncompiled, with a warning in the log alone
MOST_VERSIONS = 64


def check_backend(name: str, *, where: str) -> None:
    """Refuse what torch.compile does not know.

    Raises:
        ValueError: no such backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ValueError(f"{where}={name!r}: {nearest(name, known)}")


def _allow_versions() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)


def compile_parts(cfg: RunConfig, model: Denoiser, autoencoder: Autoencoder) -> None:
    """What the config asks for; before the booster wraps the model. Raises as the functions below."""
    if cfg.compile_blocks is not None:
        compile_blocks(model, cfg.compile_blocks)
    if cfg.compile_autoencoder is not None:
        compile_autoencoder(autoencoder, cfg.compile_autoencoder)


def compile_blocks(model: nn.Module, backend: str) -> int:
    """Compile each repeated block on its own, in place: one compilation serves them all, at any depth.

    Names and weights stay what they are. Call it before the booster wraps the model.

    Args:
        backend: of torch.compile.

    Returns: how many blocks there are.

    Raises:
        ValueError: the model has no plan that names its blocks.
    """
    where = f"compile_blocks={backend!r}"
    check_backend(backend, where="compile_blocks")
    blocks = [block for _, block in modules_at(model, plan_of(model, where=where).blocks)]
    _allow_versions()
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def compile_autoencoder(autoencoder: Autoencoder, backend: str) -> None:
    """Compile encoder and decoder in place; each shape of a clip or tile is compiled when it is first seen.

    The modules themselves are compiled. To assign a compiled function to the name of a method of the autoencoder, as
    the published system does, compiles nothing: calls find the method of the class.

    Raises:
        ValueError: it has no such networks.
    """
    check_backend(backend, where="compile_autoencoder")
    holders = [autoencoder, *autoencoder.children()]  # one that wraps another library's class has it as a child
    found = {name: getattr(holder, name) for holder in holders for name in NETWORKS if hasattr(holder, name)}
    if len(found) < len(NETWORKS):
        raise ValueError(
            f"compile_autoencoder={backend!r}: {type(autoencoder).__name__} has no {' and '.join(NETWORKS)} to "
            "compile; remove the setting"
        )
    _allow_versions()
    for network in found.values():
        network.compile(backend=backend)
