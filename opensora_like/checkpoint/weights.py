"""Reads weights from whatever holds them, and puts them into a model with a report of every key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import frozen_source
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.models.base import Denoiser
from opensora_like.runtime import found_by_main


class LoadReport(NamedTuple):
    """What happened to every key."""

    loaded: int
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    adapted: tuple[str, ...] = ()  # what was changed to make the weights fit

    @property
    def fits(self) -> bool:
        """Whether every key was loaded."""
        return not (self.missing or self.unexpected or self.mismatched)

    def lines(self) -> list[str]:
        """One line per change, and per key that was not loaded."""
        return [
            *(f"adapted: {change}" for change in self.adapted),
            *(f"missing, keeps its initial value: {key}" for key in self.missing),
            *(f"unexpected, not used: {key}" for key in self.unexpected),
            *(f"of another shape, not used: {key}" for key in self.mismatched),
        ]

    def __str__(self) -> str:
        return (
            f"{self.loaded} tensors loaded, {len(self.missing)} missing {self.missing[:5]}, "
            f"{len(self.unexpected)} unexpected {self.unexpected[:5]}, "
            f"{len(self.mismatched)} of another shape {self.mismatched[:5]}"
        )


def compare_shapes(
    given: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> tuple[LoadReport, set[str]]:
    """What can be loaded of tensors by name and shape. Returns: the report, and the names that fit."""
    both = given.keys() & own.keys()
    fitting = {n for n in both if tuple(given[n]) == tuple(own[n])}
    mismatched = [f"{n}: {tuple(given[n])} given, {tuple(own[n])} here" for n in sorted(both - fitting)]
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    return LoadReport(len(fitting), missing, unexpected, mismatched), fitting


def read_weights(path: str | Path, *, use_ema: bool = True, where: str = "ckpt_path") -> dict[str, Tensor]:
    """The weights in a training checkpoint, a safetensors or torch file, or a folder of safetensors shards.

    Args:
        use_ema: take the moving average of a training checkpoint where it has one.
        where: the setting that named `path`, for errors.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds no weights.
    """
    path = newest_of(Path(path), where)
    if (path / layout.STATE_FILE).is_file():
        reader = PieceReader(path)
        kind = "ema" if use_ema and "ema" in reader.kinds() else "master"
        return {name: reader.read_whole(kind, name) for name in reader.denoiser_names(kind)}
    if path.is_dir():
        return _read_folder(path, where)
    return _read_file(path, where)


def read_adapted(
    model: Denoiser, path: str | Path, *, use_ema: bool = True, where: str = "ckpt_path"
) -> tuple[dict[str, Tensor], list[str]]:
    """`read_weights` in the layout of `model`; what a partial checkpoint leaves out comes from where its run had it.

    Returns: the weights, and a line for every change that was made to fit them.

    Raises: as `read_weights` and `facts.frozen_source`.
    """
    path = newest_of(Path(path), where)
    given, base = read_weights(path, use_ema=use_ema, where=where), frozen_source(path)
    if base is None:
        return model.adapt_weights(given)
    whole, changes = read_adapted(model, base, use_ema=use_ema, where=f"what {str(path)!r} left frozen")
    return {**whole, **given}, [*changes, f"{len(whole) - len(given)} frozen tensors from {base}"]


def read_also(model: Denoiser) -> tuple[dict[str, Tensor], list[str]]:
    """What `model` names beside its `from_pretrained` (`also_pretrained`: setting -> path), in its layout.

    Returns and Raises: as `read_adapted`; {} for a model that names nothing.
    """
    weights: dict[str, Tensor] = {}
    notes: list[str] = []
    for where, path in getattr(model, "also_pretrained", {}).items():
        found, changes = read_adapted(model, path, where=where)
        weights |= found
        notes += [*changes, f"{len(found)} tensors from {where}={path!r}"]
    return weights, notes


def check_agree(model: Denoiser, weights: Mapping[str, Tensor], added: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse two sources of one weight: what was trained further would be replaced by what is put over it.

    Args:
        weights: read from `source`, the model's `from_pretrained`.
        added: as `read_also` gives them.

    Raises:
        ValueError: both have a weight, and it is not the same.
    """
    both = [name for name in added if name in weights]
    if differ := [name for name in both if not torch.equal(weights[name].float(), added[name].float())]:
        second = next(iter(model.also_pretrained))
        raise ValueError(
            f"model.from_pretrained={source!r} has {len(differ)} of the tensors of {second}="
            f"{model.also_pretrained[second]!r}, and others: {differ[:2]}; to go on from them set {second} to None"
        )


def newest_of(path: Path, where: str) -> Path:
    """`path` itself, or the newest checkpoint that it means (a pattern, or the folder of a run)."""
    if any(c in str(path) for c in "*?[") or (path.is_dir() and layout.complete_checkpoints(path)):
        return layout.find_checkpoint(str(path), path)
    if not path.exists():
        raise FileNotFoundError(f"{where}={str(path)!r} does not exist")
    if path.is_symlink() and (path / layout.STATE_FILE).is_file():  # ``latest``, which a run that goes on moves
        return path.resolve()
    return path


def found_sources(section: Mapping[str, Any], names: Sequence[str], *, where: str) -> dict[str, Any]:
    """`section` with the checkpoints that its `names` mean now: a run that goes on publishes others meanwhile.

    All ranks call this and have the same.

    Args:
        where: what stands before a name in errors, as "model.".

    Raises:
        FileNotFoundError: nothing is there; on all ranks.
    """
    found = dict(section)
    for name in names:
        if isinstance(source := section.get(name), str):
            newest = found_by_main(lambda path=Path(source), name=name: newest_of(path, f"{where}{name}"))
            found[name] = source if newest == Path(source) else str(newest)
    return found


def _read_folder(path: Path, where: str) -> dict[str, Tensor]:
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{where}={str(path)!r} is a folder without {layout.STATE_FILE} and without *.safetensors")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(_read_file(file, where))
    return weights


def _read_file(path: Path, where: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{where}: {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as problem:  # safetensors has its own error type
            raise ValueError(f"{where}={str(path)!r} is not a readable safetensors file: {problem}") from problem
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as problem:  # torch and its unpickler raise many types
            raise ValueError(f"{where}={str(path)!r} is not a readable torch file: {problem}") from problem
        if not isinstance(loaded, Mapping):
            return loaded
        return next((loaded[key] for key in ("state_dict", "module") if isinstance(loaded.get(key), Mapping)), loaded)
    raise ValueError(f"{where}={str(path)!r}: weights are read from .safetensors, .pt, .pth, .bin, .ckpt or a folder")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: str, strict: bool = True) -> LoadReport:
    """Copy `weights` into `model`.

    Args:
        where: the setting and path they come from, for errors.
        strict: False lets keys be missing, unexpected or of another shape, and reports them.

    Returns: the report; the caller logs it.

    Raises:
        ValueError: strict and not every key fits, or not strict and none does.
    """
    own = model.state_dict()
    report, fitting = compare_shapes({n: w.shape for n, w in weights.items()}, {n: t.shape for n, t in own.items()})
    if not fitting or (strict and not report.fits):
        raise ValueError(f"{where} does not fit the model: {report}")
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(weights[name])
    return report


def load_pretrained(model: Denoiser, source: str, *, where: str, strict: bool, use_ema: bool = True) -> LoadReport:
    """Read `source` and put it into `model`, in the layout that the model has.

    Returns: the report, with every change that was made to fit them; the caller logs it.

    Raises: as `read_weights` and `load_weights`.
    """
    weights, changes = read_adapted(model, source, use_ema=use_ema, where=where)
    added, more = read_also(model)
    check_agree(model, weights, added, source=source)
    report = load_weights(model, {**weights, **added}, where=f"{where}={source!r}", strict=strict)
    changes = [*changes, *more]
    return report._replace(adapted=tuple(changes))
