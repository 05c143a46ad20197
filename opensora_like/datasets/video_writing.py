"""Write frames as files that every player shows."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Sound(NamedTuple):
    """One channel: float32 [samples] in [-1, 1], and samples per second."""

    samples: np.ndarray
    rate: int


def write_video(
    path: str | Path, frames_THWC: np.ndarray, fps: float, *, crf: int = 17, sound: Sound | None = None
) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264 in yuv420p, which every player shows.

    Args:
        crf: 0 to 51; lower is better and larger.
        sound: beginning with the first frame, as AAC.

    Raises:
        ValueError: no frames, another shape or type, an odd height or width, or an fps that is not above 0.
    """
    import av

    frames_THWC = np.asarray(frames_THWC)
    _check_frames(path, frames_THWC)
    height, width = frames_THWC.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{str(path)!r}: H.264 needs even sizes, got {width} x {height}; crop or pad one pixel")
    if not 0 < fps < math.inf:
        raise ValueError(f"{str(path)!r}: fps={fps!r} must be above 0")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        track = container.add_stream("aac", rate=sound.rate, layout="mono") if sound is not None else None
        for pixels in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            _write_sound(container, track, sound)


def _write_sound(container: Any, track: Any, sound: Sound) -> None:
    import av

    samples = np.ascontiguousarray(sound.samples, np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    # without a time the encoder's run-in is heard as a delay
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    container.mux(track.encode(frame))
    container.mux(track.encode(None))


def write_image(path: str | Path, frame_HWC: np.ndarray) -> None:
    """Write one uint8 frame [H, W, 3] (or [1, H, W, 3]) in the format of the suffix."""
    from PIL import Image

    frame_HWC = np.asarray(frame_HWC)
    frames = frame_HWC if frame_HWC.ndim == 4 else frame_HWC[None]
    _check_frames(path, frames)
    if len(frames) != 1:
        raise ValueError(f"{str(path)!r}: an image has 1 frame, got {len(frames)}; use write_video")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frames[0]).save(path)


def _check_frames(path: str | Path, frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{str(path)!r}: frames must be uint8 [T, H, W, 3], got {frames.dtype} {frames.shape}")
