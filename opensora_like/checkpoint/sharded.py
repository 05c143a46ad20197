"""Loads published weights into a sharded model; each rank reads what it owns and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opensora_like.boosters.base import Booster, ShardRange, ShardStrips
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.files import TensorFile
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.checkpoint.weights import LoadReport, compare_shapes, newest_of
from opensora_like.models.base import Denoiser

OnRead = Callable[[int], None]  # told the bytes of every read


class WeightSource(Protocol):
    """Weights that can be read in parts."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""

    def read(self, name: str, place: ShardRange | ShardStrips) -> Tensor:
        """What a rank owns of a tensor, flat, on the CPU, in the dtype of the file."""


class _Pieces:
    """A checkpoint of this program."""

    def __init__(self, folder: Path, *, use_ema: bool, on_read: OnRead) -> None:
        self._reader, self._on_read = PieceReader(folder), on_read
        self._kind = "ema" if use_ema and "ema" in self._reader.kinds() else "master"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._reader.shape(self._kind, name) for name in self._reader.denoiser_names(self._kind)}

    def read(self, name: str, place: ShardRange | ShardStrips) -> Tensor:
        part = self._reader.read_place(self._kind, name, place)
        self._on_read(part.nbytes)
        return part


class _Safetensors:
    """Files of safetensors, read and not mapped: pages of a mapped file would count as this process's memory."""

    def __init__(self, files: list[Path], *, where: str, on_read: OnRead) -> None:
        self._on_read = on_read
        self._file_of: dict[str, TensorFile] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"{where}: {str(path)!r} does not exist")
            try:
                file = TensorFile(path)
            except OSError as problem:
                raise ValueError(f"{where}={str(path)!r} is not a readable safetensors file: {problem}") from problem
            self._shapes |= file.shapes()
            self._file_of |= dict.fromkeys(file.shapes(), file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, place: ShardRange | ShardStrips) -> Tensor:
        file = self._file_of[name]
        out = torch.empty(sum(strip.length * strip.count for strip in place.strips), dtype=file.dtype(name))
        for strip in place.strips:
            for i in range(strip.count):
                at = strip.at + i * strip.step
                file.read_into(out[at : at + strip.length], name, strip.start + i * strip.stride)
        self._on_read(out.nbytes)
        return out


def open_source(
    path: str | Path, *, where: str, use_ema: bool = True, on_read: OnRead = lambda num_bytes: None
) -> WeightSource | None:
    """Weights that can be read in parts: a training checkpoint, a safetensors file or a folder of them.

    Returns: None for another format, which can only be read whole.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that cannot be read.
    """
    path = newest_of(Path(path), where)
    if (path / layout.STATE_FILE).is_file():
        return _Pieces(path, use_ema=use_ema, on_read=on_read)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if indices := sorted(path.glob("*.safetensors.index.json")):
            files = [path / n for n in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    return _Safetensors(files, where=where, on_read=on_read)


class LoadPlan(NamedTuple):
    """Where each parameter comes from."""

    names: dict[str, str]  # parameter -> tensor of the source
    report: LoadReport

    def check(self, *, where: str, strict: bool) -> None:
        """Refuse what `weights.load_weights` refuses.

        Raises:
            ValueError: strict and not every key fits, or not strict and none does.
        """
        if not self.names or (strict and not self.report.fits):
            raise ValueError(f"{where} does not fit the model: {self.report}")


def plan_load(model: Denoiser, source: WeightSource) -> LoadPlan | None:
    """Match a source with a model, both by names and shapes alone.

    The model adapts tensors on ``meta``: those that come back as they were given were renamed at most.

    Returns: None where a tensor has to be changed, such as a fused qkv that is split.
    """
    given = {name: torch.empty(shape, device="meta") for name, shape in source.shapes().items()}
    adapted, changes = model.adapt_weights(given)
    name_of = {id(tensor): name for name, tensor in given.items()}
    if any(id(tensor) not in name_of for tensor in adapted.values()):
        return None
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    report, fitting = compare_shapes({n: tuple(t.shape) for n, t in adapted.items()}, own)
    names = {name: name_of[id(adapted[name])] for name in own if name in fitting}
    return LoadPlan(names, report._replace(adapted=tuple(changes)))


def load_pretrained_sharded(
    booster: Booster, source: WeightSource, rename: Mapping[str, str], *, initial: Callable[[str], Tensor]
) -> None:
    """Fill the masters of a prepared model that was built on ``meta``. All ranks call it.

    Args:
        rename: parameter -> tensor of the source, of the same shape.
        initial: parameter that the source lacks -> its whole value; such are few.
    """
    places = booster.ranges()
    for name, shard in booster.master_shards():
        place = places[name]
        if name in rename:
            part = source.read(rename[name], place) if place.strips else None
        else:
            part = _taken(initial(name), place)
        if part is not None and part.numel():
            shard.copy_(part)
    booster.refresh()


def _taken(whole: Tensor, place: ShardRange | ShardStrips) -> Tensor:
    """A rank's part of a whole tensor, flat."""
    flat = whole.reshape(-1)
    out = flat.new_empty(sum(strip.length * strip.count for strip in place.strips))
    for strip in place.strips:
        rows = flat.as_strided((strip.count, strip.length), (strip.stride, 1), strip.start)
        out.as_strided((strip.count, strip.length), (strip.step, 1), strip.at).copy_(rows)
    return out
