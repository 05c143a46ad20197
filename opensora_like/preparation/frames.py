"""Which frames of a video make a clip, to which size they are brought, and what the autoencoder's rules leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import BadSample, VideoInfo, read_frames

if TYPE_CHECKING:
    import torch

Mode = Literal["video", "frames"]
Rule = Literal["floor", "pad", "error"]
Select = Literal["head", "middle", "uniform", "windows"]
ResizeMode = Literal["bilinear", "bicubic", "nearest", "area", "lanczos"]
TEMPORAL_STRIDE = 4  # of the Wan 2.1 autoencoder: 4n+1 frames
SIZE_MULTIPLE = 16  # pixels: 8 of the autoencoder, times 2 of the denoiser's patches
_CHUNK = 64  # frames that are in memory at the source's size


class Pick(NamedTuple):
    """The frames of one sample.

    Args:
        indices: of the source, in order.
        num_chosen: frames before the autoencoder's rule cut or padded them.
        number: from 1, of how many the clip gives; (1, 1) for the clip as a whole.
        fps: at which they play; 0 for a single frame or an unknown rate.
    """

    indices: tuple[int, ...]
    num_chosen: int
    number: tuple[int, int]
    fps: float


@dataclass(frozen=True)
class FrameChoice:
    """How the frames of a sample are chosen.

    Args:
        mode: "video" takes the whole clip, "frames" makes every one of `num_frames` evenly spaced frames a sample.
        num_frames: of mode "frames"; a shorter clip gives all that it has.
        target_frames: of mode "video": most frames of a sample, 4n+1. None takes all.
        select: which of more than `target_frames`: the first, those in the middle, some evenly spaced over the clip,
            or all, as several samples.
        window_stride: of "windows", frames from one beginning to the next; None is `target_frames`.
        fps: frames of faster clips are left out until they play at this rate; slower clips stay as they are.
        rule: what to do with a number of frames that is not 4n+1: leave the last ones out (what the autoencoder would
            do without saying so), repeat the last one, or refuse the clip.

    Raises:
        ValueError: settings that do not fit each other.
    """

    mode: Mode = "video"
    num_frames: int | None = None
    target_frames: int | None = None
    select: Select = "head"
    window_stride: int | None = None
    fps: float | None = None
    rule: Rule = "floor"

    def __post_init__(self) -> None:
        for name, options in (("mode", Mode), ("select", Select), ("rule", Rule)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {list(get_args(options))}")
        for name in ("num_frames", "target_frames", "window_stride"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps!r} must be above 0")
        if self.mode == "frames":
            self._check_frames_mode()
            return
        if self.num_frames is not None:
            raise ValueError(f"num_frames={self.num_frames} is for mode 'frames'; mode 'video' has target_frames")
        if self.target_frames is None and (self.select != "head" or self.window_stride is not None):
            raise ValueError(f"select={self.select!r} and window_stride need target_frames")
        if self.target_frames is not None and self.target_frames % TEMPORAL_STRIDE != 1:
            below = self.target_frames - (self.target_frames - 1) % TEMPORAL_STRIDE
            raise ValueError(
                f"target_frames={self.target_frames} is not 4n+1; use {below} or {below + TEMPORAL_STRIDE}"
            )
        if self.window_stride is not None and self.select != "windows":
            raise ValueError(f"window_stride={self.window_stride} needs select='windows', not {self.select!r}")

    def _check_frames_mode(self) -> None:
        if self.num_frames is None:
            raise ValueError("mode 'frames' needs num_frames, how many to take of each clip")
        unused = {"target_frames": None, "select": "head", "window_stride": None, "fps": None, "rule": "floor"}
        given = [name for name, default in unused.items() if getattr(self, name) != default]
        if given:
            raise ValueError(f"{given} say nothing in mode 'frames', whose samples have one frame; remove them")

    @property
    def is_split(self) -> bool:
        """Whether a clip may give several samples, which then are numbered."""
        return self.mode == "frames" or self.select == "windows"

    def picks(self, path: str | Path, info: VideoInfo, start: int, end: int | None) -> list[Pick]:
        """The samples of a clip.

        Args:
            start, end: first and last frame of the clip; an end behind that of the file, or None, is the file's.

        Raises:
            BadSample: the clip begins behind the end of the file, or breaks `rule`.
        """
        if start >= info.num_frames:
            raise BadSample(path, f"start_frame={start}, but it has {info.num_frames} frames")
        last = info.num_frames - 1 if end is None else min(end, info.num_frames - 1)
        if self.mode == "frames":
            count = min(self.num_frames, last - start + 1)
            # the last one, too, as the published trainer has it
            taken = [int(i) for i in np.linspace(start, last, count)] if count > 1 else [start]
            return [Pick((index,), 1, (number, count), 0.0) for number, index in enumerate(taken, 1)]
        indices, fps = self._thinned(range(start, last + 1), info.fps)
        windows = self._windows(indices)
        picks = []
        for number, window in enumerate(windows, 1):
            rate = fps * (len(window) - 1) / max(len(indices) - 1, 1) if self.select == "uniform" else fps
            kept = self._ruled(path, window)
            picks.append(Pick(kept, len(window), (number, len(windows)), round(rate, 6) if len(kept) > 1 else 0.0))
        return picks

    def _thinned(self, indices: range, fps: float) -> tuple[tuple[int, ...], float]:
        """Frames nearest to the times at which a slower clip shows its own."""
        if math.isnan(fps) or fps <= 0:
            return tuple(indices), 0.0
        if self.fps is None or fps <= self.fps:
            return tuple(indices), fps
        count = int((len(indices) - 1) * self.fps / fps) + 1
        return tuple(indices[math.floor(n * fps / self.fps + 0.5)] for n in range(count)), self.fps

    def _windows(self, indices: tuple[int, ...]) -> list[tuple[int, ...]]:
        size = self.target_frames
        if size is None or len(indices) <= size:
            return [indices]
        if self.select == "uniform":
            return [tuple(indices[int(i)] for i in np.linspace(0, len(indices) - 1, size))]
        if self.select == "windows":
            begins = range(0, len(indices) - size + 1, self.window_stride or size)
            return [indices[begin : begin + size] for begin in begins]
        begin = (len(indices) - size) // 2 if self.select == "middle" else 0
        return [indices[begin : begin + size]]

    def _ruled(self, path: str | Path, indices: tuple[int, ...]) -> tuple[int, ...]:
        over = (len(indices) - 1) % TEMPORAL_STRIDE
        if over == 0:
            return indices
        if self.rule == "error":
            raise BadSample(path, f"{len(indices)} frames are not 4n+1; cut the clip, or use the rule 'floor' or 'pad'")
        return indices[:-over] if self.rule == "floor" else indices + indices[-1:] * (TEMPORAL_STRIDE - over)


@dataclass(frozen=True)
class Picture:
    """To which size frames are brought, and how.

    Args:
        height, width: pixels, multiples of 16; both or neither. Neither keeps the source's size, to the nearest
            multiples.
        resize_mode: of the samples; the first four as the published trainer's OpenCV names them.
        center_crop: scale to cover the size and cut the middle out, so that all clips have it. Without it clips are
            scaled to fit into the size, and each has the nearest multiples of its own.
        keep_aspect: False stretches to the size.
        antialias: average over what a frame is made smaller by; of "bilinear" and "bicubic".

    Raises:
        ValueError: settings that do not fit each other.
    """

    height: int | None = None
    width: int | None = None
    resize_mode: ResizeMode = "bilinear"
    center_crop: bool = False
    keep_aspect: bool = True
    antialias: bool = False

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height={self.height} and width={self.width}: give both, or neither to keep the size")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < SIZE_MULTIPLE or side % SIZE_MULTIPLE):
                raise ValueError(f"{name}={side} is not a multiple of {SIZE_MULTIPLE}; the nearest is {_nearest(side)}")
        if self.resize_mode not in get_args(ResizeMode):
            raise ValueError(f"resize_mode={self.resize_mode!r} is not one of {list(get_args(ResizeMode))}")
        if self.antialias and self.resize_mode not in ("bilinear", "bicubic"):
            raise ValueError(f"antialias is for bilinear and bicubic, resize_mode is {self.resize_mode!r}")
        if self.center_crop and not self.keep_aspect:
            raise ValueError(
                "center_crop has nothing to cut off when frames are stretched to the size; give one of them"
            )
        if self.height is None and (self.center_crop or not self.keep_aspect):
            raise ValueError("center_crop and no_aspect_ratio need height and width")

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the latents' source, for frames of this size."""
        if self.height is None:
            return _nearest(height), _nearest(width)
        if self.center_crop or not self.keep_aspect:
            return self.height, self.width
        scale = min(self.height / height, self.width / width)
        return _nearest(height * scale), _nearest(width * scale)

    def bring(self, frames_THWC: np.ndarray) -> torch.Tensor:
        """uint8 frames at the size of `size_of`, float32 [3, T, H, W] in [-1, 1]."""
        height, width = self.size_of(*frames_THWC.shape[1:3])
        if self.resize_mode == "bilinear" and self.keep_aspect and not self.antialias:
            return resize_crop(frames_THWC, height, width)  # as training on the videos themselves does
        return _scaled(frames_THWC, height, width, self)


def _nearest(side: float) -> int:
    return max(SIZE_MULTIPLE, math.floor(side / SIZE_MULTIPLE + 0.5) * SIZE_MULTIPLE)


def _scaled(frames_THWC: np.ndarray, height: int, width: int, picture: Picture) -> torch.Tensor:
    """Frame by frame: scaled to cover the size, or to it, and the middle of it."""
    import torch
    import torch.nn.functional as F

    source = frames_THWC.shape[1:3]
    scale = max(height / source[0], width / source[1])
    cover = tuple(max(side, math.floor(own * scale + 0.5)) for side, own in zip((height, width), source, strict=True))
    size = cover if picture.keep_aspect else (height, width)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    out = torch.empty(3, len(frames_THWC), height, width)
    for t, frame in enumerate(frames_THWC):
        if picture.resize_mode == "lanczos":
            x_CHW = _lanczos(frame, size)
        else:
            x_1CHW = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255
            options = {"align_corners": False, "antialias": picture.antialias}
            smooth = options if picture.resize_mode in ("bilinear", "bicubic") else {}
            x_CHW = F.interpolate(x_1CHW, size=size, mode=picture.resize_mode, **smooth)[0]
        # bicubic goes beyond the range, and 8 bits would have cut that off
        out[:, t] = (x_CHW[:, top : top + height, left : left + width].clamp(0, 1) - 0.5) / 0.5
    return out


def _lanczos(frame_HWC: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    import torch
    from PIL import Image

    picture = Image.fromarray(frame_HWC).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def read_clip(path: str | Path, pick: Pick, picture: Picture) -> torch.Tensor:
    """Decode the frames of a sample, a part at a time, and bring them to their size.

    Returns: float32 [3, T, H, W] in [-1, 1].

    Raises:
        BadSample: the file cannot be read, or has fewer frames than its header says.
    """
    import torch

    parts = []
    for begin in range(0, len(pick.indices), _CHUNK):
        parts.append(picture.bring(read_frames(path, pick.indices[begin : begin + _CHUNK])))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
