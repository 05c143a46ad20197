"""Write small videos with known frames, sound ones and odd ones, for tests and benchmarks."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

NUM_BITS = 8
# tkhd matrices (16.16 fixed point; the last column 2.30) by degrees clockwise; the offsets do not matter here
MATRICES = {
    0: (1, 0, 0, 1),
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def numbered_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames that carry their own number, so that a reader's choice of frames can be checked.

    The upper half of frame i shows the bits of i (modulo 256) as bright and dark columns; the lower half is dark
    to the left and bright to the right, so that a turned picture shows.

    Returns: uint8 [T, H, W, 3].
    """
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = np.linspace(40, 200, width, dtype=np.uint8)[:, None]
    edges = np.linspace(0, width, NUM_BITS + 1).astype(int)
    for i in range(num_frames):
        for bit in range(NUM_BITS):
            frames[i, : height // 2, edges[bit] : edges[bit + 1]] = 230 if i >> bit & 1 else 25
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """Read the numbers back from frames [T, H, W, 3] of `numbered_frames`, also after lossy coding."""
    height, width = frames.shape[1:3]
    edges = np.linspace(0, width, NUM_BITS + 1).astype(int)
    centres = (edges[:-1] + edges[1:]) // 2
    bits = frames[:, height // 4, centres].mean(axis=-1) > 128
    return (bits @ (1 << np.arange(NUM_BITS))).tolist()


def write_clip(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float | Fraction = 24,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    pts: Sequence[int] | None = None,
    container_options: Mapping[str, str] | None = None,
    with_audio: bool = False,
) -> Path:
    """Encode `frames` [T, H, W, 3] uint8.

    Args:
        options: of the encoder: ``bf`` B-frames, ``g`` the distance of keyframes.
        pts: of each frame, in thousandths of a second: a variable frame rate, or a start other than 0.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.codec_context.thread_count = 1  # frames of this size gain nothing from more
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if frames.shape[1] % 2 or frames.shape[2] % 2 else "yuv420p"
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if with_audio else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_tone(container, sound, seconds=float(len(frames) / rate))
    return path


def _write_tone(container: object, stream: object, *, seconds: float) -> None:
    import av

    samples = np.sin(np.arange(int(16000 * seconds)) * 0.1).astype(np.float32)[None]
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, start : start + 1024]), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def turn(path: Path, degrees: int) -> Path:
    """Write a display rotation (clockwise) into the first track header of an mp4, as a telephone does."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    offset = start + (52 if data[start] == 1 else 40)
    a, b, c, d = (n << 16 for n in MATRICES[degrees])
    struct.pack_into(">9i", data, offset, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut(path: Path, share: float, *, to: Path) -> Path:
    """Copy the first `share` of a file's bytes."""
    data = path.read_bytes()
    to.write_bytes(data[: int(len(data) * share)])
    return to


def write_fakes(folder: Path) -> dict[str, Path]:
    """Files that are named like videos and are none: by what is wrong with them."""
    fakes = {name: folder / f"{name}.mp4" for name in ("empty", "text", "noise", "sound", "folder", "missing")}
    fakes["empty"].touch()
    fakes["text"].write_text("this is a caption, not a video\n" * 50)
    fakes["noise"].write_bytes(np.random.default_rng(0).bytes(5000))
    write_sound(fakes["sound"])
    fakes["folder"].mkdir()
    return fakes


def write_sound(path: Path, seconds: float = 0.5) -> Path:
    """An mp4 that holds sound only."""
    import av

    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream("aac", rate=16000, layout="mono"), seconds=seconds)
    return path


def note_decoded(monkeypatch) -> list[int]:
    """The time stamps of the frames that `video_io` decodes from now on, as they come."""
    from opensora_like.datasets import video_io

    decoded: list[int] = []
    original = video_io._decode

    def noting(container, stream):
        for frame in original(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_io, "_decode", noting)
    return decoded
