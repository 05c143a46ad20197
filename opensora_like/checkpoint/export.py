"""Writes weights for other programs: one safetensors file, or shards with an index, as diffusers reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opensora_like.checkpoint.files import write_safetensors, write_text
from opensora_like.checkpoint.pieces import PieceReader

WHOLE = "diffusion_pytorch_model"  # what diffusers looks for
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "80GB", "500MiB" or "1000".

    Raises:
        ValueError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"size {text!r} is not of the form 80GB, 500MiB or 1000")
    return int(float(match[1]) * UNITS[match[2] or ""])


class Weights(Protocol):
    """What can be exported: tensors by name, read one at a time, whose sizes are known before."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def num_elements(self, name: str) -> int: ...


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a training checkpoint, read one at a time.

    Args:
        kind: "master" or "ema".
    """

    def __init__(self, reader: PieceReader, kind: str) -> None:
        self._reader, self._kind, self._names = reader, kind, reader.denoiser_names(kind)

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read_whole(self._kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def num_elements(self, name: str) -> int:
        """Elements of a tensor, without reading it."""
        return torch.Size(self._reader.shape(self._kind, name)).numel()


def checkpoint_weights(folder: Path, *, use_ema: bool) -> CheckpointWeights:
    """The weights of a complete checkpoint.

    Raises:
        ValueError: the EMA is asked for and there is none.
    """
    reader = PieceReader(folder)
    if use_ema and "ema" not in reader.kinds():
        raise ValueError(f"{str(folder)!r} has no EMA: it was trained with ema_decay=None; leave --ema out")
    return CheckpointWeights(reader, "ema" if use_ema else "master")


def export_weights(
    weights: Weights,
    out: Path,
    *,
    max_shard_size: int,
    dtype: torch.dtype | None = torch.bfloat16,
    base_name: str = WHOLE,
    on_file: Callable[[Path], None] = lambda path: None,
) -> list[Path]:
    """Write `weights` below `out`, in place of an earlier export of this `base_name`; one shard is in memory at a time.

    Args:
        max_shard_size: bytes; a tensor that is larger than this has a file of its own.
        dtype: None keeps each tensor's own; its shards are cut as if they were float32.
        base_name: ``NAME.safetensors``, or ``NAME-00001-of-00003.safetensors`` and ``NAME.safetensors.index.json``.

    Returns: the files of tensors.

    Raises:
        OSError: the disk is full or read-only.
    """
    out.mkdir(parents=True, exist_ok=True)
    item = torch.empty(0, dtype=dtype or torch.float32).element_size()
    shards: list[list[str]] = [[]]
    filled = 0
    for name in weights:
        size = weights.num_elements(name) * item
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files, index, total = [], {}, 0
    for number, names in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = out / f"{base_name}{suffix}.safetensors"
        tensors = [(n, weights[n].to(dtype=dtype).contiguous()) for n in names]
        write_safetensors(path, tensors)
        total += sum(tensor.nbytes for _, tensor in tensors)
        index |= dict.fromkeys(names, path.name)
        files.append(path)
        on_file(path)
    for old in out.iterdir():  # of an earlier export: whoever reads the folder would take its index and its shards
        is_shard = re.fullmatch(re.escape(base_name) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
        if is_shard and old not in files:
            old.unlink()
    if len(shards) > 1:
        table = {"metadata": {"total_size": total}, "weight_map": index}
        write_text(out / f"{base_name}.safetensors.index.json", json.dumps(table, indent=1))
    return files
