"""Puts a published file into an autoencoder: every key, or an error that lists what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_published(module: nn.Module, path: str, *, dtype: torch.dtype | None = None) -> None:
    """Replace the weights of `module` by those of a safetensors file.

    Args:
        module: may be on ``meta``; afterwards its weights are on the CPU.
        dtype: of the weights afterwards; None keeps that of the file.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: it is no safetensors file, or its keys or shapes are not those of `module`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"autoencoder.from_pretrained={path!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where} is not a file; give a .safetensors file, or None for random weights")
    try:
        weights = load_file(path)
    except SafetensorError as problem:
        raise ValueError(f"{where} cannot be read as safetensors: {problem}") from problem
    check_keys(module, weights, where=where)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    module.load_state_dict(weights, assign=True)
    logger.info("%s: %d tensors loaded, 0 missing, 0 unexpected", where, len(weights))


def check_keys(module: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: they differ; counts and the first few of each kind.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    reshaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{where}: {len(weights)} tensors for {len(expected)} of the model; {len(missing)} missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}, {len(reshaped)} of another shape {reshaped[:4]}; "
            "use the file of this architecture, or change the arguments to fit"
        )


def finish(module: nn.Module, *, from_pretrained: str | None, dtype: str | None) -> None:
    """What every constructor does last: load, cast, freeze."""
    target = None if dtype is None else DTYPES[dtype]
    if from_pretrained is not None:
        load_published(module, from_pretrained, dtype=target)
    elif target is not None:
        module.to(target)
    module.requires_grad_(False).eval()
