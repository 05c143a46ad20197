"""Which weights of a checkpoint are validated: the average before whole ones before sharded ones, never others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import CONFIG_FILE
from opensora_like.checkpoint.pieces import PieceReader

Kind = Literal["ema", "consolidated", "sharded"]
NEWEST = ("LATEST", "latest")
STEP = re.compile(r"(?:.*[_-])?step[_-]?(\d+)")  # epoch_0_step_999, step_1000
DCP_METADATA = ".metadata"


class FoundWeights(NamedTuple):
    """What was found.

    Args:
        path: a file, or a folder that `checkpoint.weights` or torch's distributed checkpoint reads.
        step: of the run that wrote it, None where nothing says so.
        is_own: a checkpoint of this program.
    """

    kind: Kind
    path: Path
    step: int | None
    is_own: bool

    def __str__(self) -> str:
        return f"{self.kind} weights of {str(self.path)!r}"


class _Place(NamedTuple):
    """Where one kind of weights may be.

    Args:
        name: for the error, relative to the checkpoint.
        find: checkpoint's folder -> what to read, or None.
    """

    kind: Kind
    name: str
    find: Callable[[Path], Path | None]


def _file(name: str) -> Callable[[Path], Path | None]:
    return lambda folder: folder / name if (folder / name).is_file() else None


def _shards(name: str) -> Callable[[Path], Path | None]:
    return lambda folder: folder / name if any((folder / name).glob("*.safetensors")) else None


def _dcp(name: str) -> Callable[[Path], Path | None]:
    return lambda folder: folder / name if any((folder / name).glob("*.distcp")) else None


def _own(kind: str) -> Callable[[Path], Path | None]:
    def find(folder: Path) -> Path | None:
        if not (folder / layout.STATE_FILE).is_file():
            return None
        return folder if kind in PieceReader(folder).kinds() else None

    return find


# the first that is there is taken
PLACES = (
    _Place("ema", "ema_shadow.pt", _file("ema_shadow.pt")),
    _Place("ema", f"{layout.STATE_FILE} with an EMA", _own("ema")),
    _Place("consolidated", "consolidated_model.bin", _file("consolidated_model.bin")),
    _Place("consolidated", "model/consolidated/*.safetensors", _shards("model/consolidated")),
    _Place("consolidated", "*.safetensors", lambda f: None if (f / layout.STATE_FILE).exists() else _shards(".")(f)),
    _Place("sharded", f"{layout.STATE_FILE} with masters", _own("master")),
    _Place("sharded", "model/*.distcp", _dcp("model")),
    _Place("sharded", "*.distcp", _dcp(".")),
)


def find_weights(checkpoint: str) -> FoundWeights:
    """The weights that ``--checkpoint`` means.

    Args:
        checkpoint: a checkpoint's folder, a file of weights, or ``FOLDER/LATEST``: the newest complete one in there,
            whatever a link of that name says. ``LATEST`` alone looks into ``./checkpoints``.

    Raises:
        FileNotFoundError: nothing is there; the message lists what was looked for.
        ValueError: there are shards that cannot be read here.

    Source: the order of NVIDIA-NeMo/DFM:examples/automodel/generate/wan_validate.py, which goes on with the base
    model where it finds nothing.
    """
    path = Path(checkpoint)
    if path.name in NEWEST:
        return _newest(path.parent if len(path.parts) > 1 else Path("checkpoints"), checkpoint)
    if path.is_file():
        return FoundWeights("ema" if "ema" in path.stem.lower() else "consolidated", path, None, False)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint={checkpoint!r} does not exist; {_complete(path.parent)}")
    if inside := layout.complete_checkpoints(path):  # the folder of a run
        path = inside[-1]
    found = _look(path.resolve())
    if found is None:
        raise FileNotFoundError(
            f"checkpoint={checkpoint!r} has no weights that can be read; looked for {[p.name for p in PLACES]} there, "
            f"in this order, and found {sorted(f.name for f in path.iterdir())[:12]}; {_complete(path)}"
        )
    return found


def _look(folder: Path) -> FoundWeights | None:
    is_own = (folder / layout.STATE_FILE).is_file()
    match = STEP.fullmatch(folder.name)
    step = int(match[1]) if match else None
    for place in PLACES:
        if (path := place.find(folder)) is not None:
            return FoundWeights(place.kind, path, step, is_own)
    if any((folder / "model").glob("shard-*.safetensors")):
        raise ValueError(
            f"{str(folder / 'model')!r} holds parts of tensors (shard-*.safetensors) and no whole ones; join them with "
            "the program that wrote them (save_consolidated) and give the result"
        )
    return None


def _newest(run: Path, checkpoint: str) -> FoundWeights:
    """The newest checkpoint in a folder that has weights: of this program by what is complete, of others by step."""
    if own := layout.complete_checkpoints(run):
        found = _look(own[-1])
        if found is not None:
            return found
    folders = [f for f in run.iterdir() if f.is_dir() and not f.is_symlink()] if run.is_dir() else []
    steps = sorted((int(m[1]), f) for f in folders if (m := STEP.fullmatch(f.name)) and not f.name.startswith("."))
    for _, folder in reversed(steps):
        if (found := _look(folder)) is not None:
            return found
    raise FileNotFoundError(
        f"checkpoint={checkpoint!r}: {str(run)!r} has no complete checkpoint; looked for epoch*-global_step* with "
        f"{layout.STATE_FILE}, and for *step_N with one of {[p.name for p in PLACES]}"
    )


def _complete(run: Path) -> str:
    names = [f.name for f in layout.complete_checkpoints(run)]
    return f"complete in {str(run)!r}: {names}" if names else f"{str(run)!r} has no complete checkpoint"


def config_beside(found: FoundWeights) -> Path | None:
    """The config that a checkpoint of this program was written with."""
    return found.path / CONFIG_FILE if found.is_own else None


def join_shards(folder: Path, out: Path) -> Path:
    """Write what torch's distributed checkpoint holds as one file that `checkpoint.weights` reads; one process.

    Its index is a pickle, so take it from where you would take a program. Prefixes of wrappers are taken off.

    Returns: `out`.

    Raises:
        ValueError: it cannot be read.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if not (folder / DCP_METADATA).is_file():
        raise ValueError(f"{str(folder)!r} has *.distcp and no {DCP_METADATA}: a save that was not finished")
    try:
        dcp_to_torch_save(folder, out)
        weights = torch.load(out, map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever its unpickler and reader raise
        raise ValueError(f"{str(folder)!r} is not a readable distributed checkpoint: {problem}") from problem
    while len(weights) == 1 and isinstance(inner := next(iter(weights.values())), dict):
        weights = inner
    wrappers = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor):
            for wrapper in wrappers:
                name = name.replace(wrapper, "")
            plain[name] = tensor
    torch.save(plain, out)
    return out
