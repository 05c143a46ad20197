"""One encoded clip per `.meta` file: read those of other trainers without running what they hold, and write them."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like.publish import staged

CAPTION_KEYS = ("vila_caption", "gemini_v2_caption", "caption", "text")  # the first that is there is the caption
TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8  # of the Wan 2.1 autoencoder
JPEG_QUALITY = 95
# what pickle, numpy and torch raise on bytes that are none of theirs
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


@dataclass(frozen=True, eq=False)
class MetaClip:
    """What a `.meta` file says of a clip.

    Args:
        latents_CTHW: normed as the denoiser takes them.
        embeddings_LD: of the caption, zero behind its end.
        num_frames: pixel frames that the latents stand for.
        first_frame: a JPEG file, or None.
        file_name: of the video, as the writer noted it; "" if it did not.
        fps: at which the frames play; 0 for one frame, or where the writer did not note it.
        other: names of tensors that Wan 2.1 does not take and which are therefore not here.
    """

    latents_CTHW: Tensor
    embeddings_LD: Tensor
    text: str
    num_frames: int
    first_frame: bytes | None = None
    file_name: str = ""
    fps: float = 0.0
    other: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.latents_CTHW.shape[2] * SPATIAL_STRIDE, self.latents_CTHW.shape[3] * SPATIAL_STRIDE


@dataclass(frozen=True)
class MetaFacts:
    """What else is written of a clip.

    Args:
        metadata: of the source: file_name, width, height (pixels), start_frame, end_frame (both within the clip).
        source_path: where the video was found.
        num_frames_read: chosen from the source, before the autoencoder's rule left the last ones out.
        mode: "video", or "frames" for a clip that is one frame of a video.
        is_deterministic: the latents are the mean of the posterior, not a sample.
        is_tiled: the autoencoder coded pictures in tiles.
        resize: target_size (height, width) or None, resize_mode, maintain_aspect_ratio, center_crop.
        frame: of a clip that gave several samples: (number of this one, from 1; how many there are).
    """

    metadata: Mapping[str, Any]
    source_path: str
    num_frames_read: int
    mode: str = "video"
    is_deterministic: bool = True
    is_tiled: bool = False
    resize: Mapping[str, Any] = field(default_factory=dict)
    frame: tuple[int, int] | None = None


def write_meta(path: str | Path, clip: MetaClip, facts: MetaFacts) -> None:
    """Write one file; it is there whole or not at all.

    The caption is written under both names that readers look for, and the first frame as the bytes of a JPEG, which
    the format's documents promise and its writer does not keep.

    Source: NVIDIA-NeMo/DFM:examples/common/wan/prepare_dataset_wan.py.
    """
    content: dict[str, Any] = {
        "text_embeddings": clip.embeddings_LD[None].cpu().clone(),  # a view would be written with all that it views
        "video_latents": clip.latents_CTHW[None].cpu().clone(),
        "metadata": {**facts.metadata, "vila_caption": clip.text, "caption": clip.text},
        "num_frames": clip.num_frames,
        "num_frames_read": facts.num_frames_read,
        "fps": clip.fps,
        "original_filename": clip.file_name,
        "original_video_path": facts.source_path,
        "deterministic_latents": facts.is_deterministic,
        "memory_optimization": facts.is_tiled,
        "model_version": "wan2.1",
        "processing_mode": facts.mode,
        "resize_settings": dict(facts.resize),
    }
    if clip.first_frame is not None:
        content["first_frame"] = clip.first_frame
    if facts.frame is not None:
        content["frame_index"], content["total_frames_in_video"] = facts.frame
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as draft, draft.open("wb") as file:
        pickle.dump(content, file, protocol=4)


def read_meta(path: str | Path) -> MetaClip:
    """Read a `.meta` file: a pickle (the writer of the format's documents, or ours) or what torch.save wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a `.meta` file, cut off, one that asks for more than numbers and text, or not of Wan 2.1.
    """
    content = read_content(path)
    latents_CTHW = _one(content, "video_latents", 5, path)
    embeddings_LD = _one(content, "text_embeddings", 3, path)
    if latents_CTHW.shape[0] != 16:
        raise ValueError(
            f"{str(path)!r}: video_latents have {latents_CTHW.shape[0]} channels, those of Wan 2.1 have 16"
        )
    known = {"video_latents", "text_embeddings", "first_frame"}
    other = sorted(k for k, v in content.items() if k not in known and isinstance(v, (Tensor, np.ndarray)))
    return MetaClip(
        latents_CTHW=latents_CTHW,
        embeddings_LD=embeddings_LD,
        text=_caption(content),
        # not what "num_frames" says: writers put the number there that they gave to the autoencoder
        num_frames=(latents_CTHW.shape[1] - 1) * TEMPORAL_STRIDE + 1,
        first_frame=_first_frame(content.get("first_frame"), path),
        file_name=str(content.get("original_filename") or Path(str(content.get("video_path") or "")).name),
        fps=float(content.get("fps") or 0.0),
        other=tuple(other),
    )


def read_content(path: str | Path) -> dict[str, Any]:
    """The dict of a `.meta` file, made of nothing but dicts, lists, text, numbers, arrays and tensors on the CPU.

    Raises: as `read_meta`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file")
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                content = torch.load(path, map_location="cpu", weights_only=True)
            else:
                file.seek(0)
                content = _plain(_Unpickler(file).load())
    except Refused as problem:
        raise ValueError(f"{str(path)!r} {problem}") from problem
    except _UNREADABLE as problem:
        raise ValueError(f"{str(path)!r} cannot be read as a .meta file: {_first_line(problem)}") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, a .meta file holds a dict")
    return content


def jpeg_of(frame_HWC: np.ndarray) -> bytes:
    """One uint8 RGB frame as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def caption_in(record: Mapping[str, Any], keys: tuple[str, ...] = CAPTION_KEYS) -> str | None:
    """The caption of a record: the first of `keys` that holds text; None if none does."""
    return next((record[k].strip() for k in keys if isinstance(record.get(k), str) and record[k].strip()), None)


class Refused(ValueError):
    """A pickle asks for a global that no `.meta` file needs."""


class _Dtype:
    """Stands for numpy.dtype while a pickle is read: only numbers, and no state that numpy would believe."""

    def __init__(self, name: str, *unused: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufc":
            raise Refused(f"holds an array of {self.dtype}, numbers only are read; the file is refused")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray while a pickle is read."""

    def __init__(self, *unused: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if is_fortran else "C").array


def _from_buffer(buffer: Any, dtype: _Dtype, shape: tuple, order: str, axis_order: None = None) -> _Array:
    made = _Array()
    raw = buffer.encode("latin1") if isinstance(buffer, str) else bytes(buffer)
    made.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order).copy()
    return made


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    return np.frombuffer(raw if isinstance(raw, bytes) else raw.encode("latin1"), dtype.dtype)[0].item()


def _storage(raw: bytes) -> Any:
    """torch's own `_load_from_bytes` unpickles without any restriction."""
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise Refused(
            f"has a tensor that is more than numbers; the file is refused: {_first_line(problem)}"
        ) from problem


def _encode(text: str, codec: str = "latin1") -> bytes:
    if codec != "latin1":
        raise Refused(f"encodes with {codec!r}, only 'latin1' is read; the file is refused")
    return text.encode(codec)


def _parameter(data: Tensor, *unused: Any) -> Tensor:
    return data.detach()


# all that a pickle of tensors, arrays and numbers asks for -> what it is given
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _Array
    _ALLOWED[_core + ".multiarray", "scalar"] = _scalar
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise Refused(
                f"asks for {module}.{name}, which no .meta file needs; the file is refused: it may run a program, so "
                "do not open it with pickle either"
            )
        return _ALLOWED[module, name]


def _plain(value: Any) -> Any:
    """Without the stand-ins."""
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def _first_line(problem: BaseException) -> str:
    """The first line of what a library says, and the global that torch refused."""
    text = str(problem).strip()
    line = text.splitlines()[0] if text else "no more is known"
    asked = re.search(r"GLOBAL ([\w.]+)", text)
    return f"{type(problem).__name__}: {f'asks for {asked[1]}' if asked else line}"


def _one(content: Mapping[str, Any], key: str, ndim: int, path: str | Path) -> Tensor:
    """The tensor of the one clip, without its dimension of batches."""
    found = content.get(key)
    if not isinstance(found, Tensor):
        raise ValueError(f"{str(path)!r} has no tensor {key!r}, only {sorted(map(str, content))}")
    if found.ndim == ndim - 1:
        return found
    if found.ndim != ndim or found.shape[0] != 1:
        raise ValueError(
            f"{str(path)!r}: {key} has the shape {tuple(found.shape)}, {ndim} dimensions of 1 clip are needed"
        )
    return found[0]


def _caption(content: Mapping[str, Any]) -> str:
    """For people to read; what trains are the embeddings, so it may be missing."""
    metadata = content.get("metadata")
    found = caption_in(metadata) if isinstance(metadata, dict) else None
    return found or caption_in(content, ("prompt",)) or ""


def _first_frame(found: Any, path: str | Path) -> bytes | None:
    """Whatever a writer took for a first frame, as a JPEG."""
    if found is None or isinstance(found, bytes):
        return found
    frame = found.numpy() if isinstance(found, Tensor) else found
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"{str(path)!r}: first_frame is {kind}, not uint8 [H, W, 3] and not a JPEG")
    return jpeg_of(frame)
