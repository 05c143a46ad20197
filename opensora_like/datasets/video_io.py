"""Open videos and images: measure them, decode only the frames that are wanted."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.display import Turn, frame_turn, track_turn

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"))

_ATTACHED_PICTURE = 0x400  # libav's disposition of cover art
_RATE_SLACK = 0.02  # by which share a header's frame rate may differ from the packets' own


class BadSample(ValueError):
    """A file that cannot be used. The loader replaces it; the csv tool lists it.

    Args:
        reason: one readable line, without the path.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path!r}: {self.reason}"


class VideoInfo(NamedTuple):
    """What a table says of a clip: sizes in pixels as displayed (rotation applied); `fps` is NaN for an image."""

    num_frames: int
    height: int
    width: int
    fps: float


def is_image(path: str | Path) -> bool:
    """By the suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def find_file(path: str, *, table_path: str | Path, data_root: str | Path | None = None) -> str:
    """Where the file of a row is: as written (below `data_root` if given), else beside the table.

    Returns: the first that exists, or `path` as written, so that reading it says what is missing.
    """
    written = os.path.join(data_root, path) if data_root else path  # noqa: PTH118 (keeps "./" as written)
    # os.path: called for a million files in a row
    beside = "" if os.path.exists(written) else os.path.join(os.path.dirname(table_path), path)  # noqa: PTH110,PTH118,PTH120
    return str(Path(beside)) if beside and os.path.exists(beside) else written  # noqa: PTH110


def probe(path: str | Path, *, timeout_seconds: float = 30.0) -> VideoInfo:
    """Measure a file without decoding it.

    The frames are those that a decoder will show. The count is taken from the container's own list of frames
    (mp4, avi) where that list agrees with the header, hides none (an edit list may) and ends within the file.
    In every other case, so for fragmented, truncated, mkv and ts files, the packets are counted, which reads
    the file once. Both are exact for a variable frame rate; `fps` is then the mean.

    Args:
        timeout_seconds: for opening, and for each read from, a device that hangs.

    Raises:
        BadSample: missing, empty, cut off before its index, not a video, without a video stream or a frame.
    """
    if is_image(path):
        return _probe_image(path)
    with _open_video(path, timeout_seconds) as (container, stream):
        num_frames, packets = _count_in_index(stream, Path(path).stat().st_size), None
        if num_frames is None:
            packets = _scan(container, stream)
            num_frames = len(packets)
        if num_frames == 0:
            raise BadSample(path, f"no whole frame in it, the header says {stream.frames}; the file is cut off")
        height, width = stream.codec_context.height, stream.codec_context.width
        if not height or not width:
            raise BadSample(path, f"its header gives no size: {width} x {height} pixels")
        if _stored_turn(path, container, stream).transpose:
            height, width = width, height
        return VideoInfo(num_frames, height, width, round(_frame_rate(stream, packets), 3))


def read_frames(path: str | Path, indices: Sequence[int], *, timeout_seconds: float = 30.0) -> np.ndarray:
    """Decode the frames at `indices` and no more than they need.

    Index n is the n-th frame shown. The mapping to time stamps is made from the packets: they are read, not
    decoded, up to the last one that can matter, and their time stamps sorted; so B-frames, a start other than 0
    and a variable frame rate are right. Then one seek to the last keyframe at or before the first wanted frame
    and one pass of decoding, with one thread. Where time stamps are missing (avi) or repeated, or a wanted one
    does not come out of the decoder, the frames are counted from the start of the file instead.

    Args:
        indices: from 0, in any order, may repeat.

    Returns: uint8 [len(indices), H, W, 3], RGB, turned as displayed.

    Raises:
        BadSample: as `probe`; damaged frames; fewer frames than asked for.
    """
    indices = [int(i) for i in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"indices={indices!r} must name at least one frame, each 0 or more")
    with _open_video(path, timeout_seconds) as (container, stream):
        frames = _read_by_time(path, container, stream, indices)
    if frames is None:
        with _open_video(path, timeout_seconds) as (container, stream):
            frames = _read_by_count(path, container, stream, indices)
    return frames


def read_image(path: str | Path) -> np.ndarray:
    """An image as a clip of one frame, uint8 [1, H, W, 3], RGB, turned as its EXIF data say.

    Raises:
        BadSample: missing, empty, truncated or not an image.
    """
    from PIL import Image, ImageOps

    _check_file(path)
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # what PIL's readers raise
        raise BadSample(path, f"not a readable image: {problem}") from problem


def _check_file(path: str | Path) -> None:
    """Say what libav and PIL would put less clearly, and keep them away from pipes, which would hang."""
    try:
        status = Path(path).stat()
    except FileNotFoundError as problem:
        raise BadSample(path, "no such file") from problem
    except (OSError, ValueError) as problem:  # no permission, a broken mount, a name with a null byte
        raise BadSample(path, f"cannot be looked up: {problem}") from problem
    if not stat.S_ISREG(status.st_mode):
        raise BadSample(path, f"is a {'folder' if stat.S_ISDIR(status.st_mode) else 'device or pipe'}, not a file")
    if status.st_size == 0:
        raise BadSample(path, "empty file (0 bytes)")


@contextmanager
def open_container(path: str | Path, *, kind: str = "a video", timeout_seconds: float = 30.0) -> Iterator[Any]:
    """A file of pictures or sound as PyAV's container, closed afterwards; what libav raises in between is BadSample.

    Args:
        kind: what the file should be, for errors.
        timeout_seconds: as `probe`.
    """
    import av

    _check_file(path)
    try:
        with av.open(
            str(Path(path).absolute()),  # a relative name with a colon would be taken for a protocol
            metadata_errors="ignore",
            timeout=timeout_seconds,
            options={"protocol_whitelist": "file"},  # a playlist in disguise may not reach the network
        ) as container:
            yield container
    except (av.error.FFmpegError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise BadSample(path, f"not {kind}, cut off or damaged: {reason}") from problem


@contextmanager
def _open_video(path: str | Path, timeout_seconds: float) -> Iterator[tuple[Any, Any]]:
    """(container, video stream); see `open_container`."""
    with open_container(path, timeout_seconds=timeout_seconds) as container:
        yield container, _video_stream(path, container)


def _video_stream(path: str | Path, container: Any) -> Any:
    streams = container.streams.video
    real = [s for s in streams if not _flags(getattr(s, "disposition", 0)) & _ATTACHED_PICTURE]
    if not real:
        kinds = sorted({s.type for s in container.streams})
        raise BadSample(path, f"no video stream, only {kinds}{' and cover art' if streams else ''}")
    if real[0].codec_context is None:
        raise BadSample(path, "its video codec is not one that this build of libav can decode")
    return real[0]


def _flags(value: Any) -> int:
    """PyAV has given dispositions as an enum of either kind."""
    return int(getattr(value, "value", value))


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool


def _scan(container: Any, stream: Any, *, last: int | None = None) -> list[_Packet]:
    """The packets of whole frames that will be shown, in the order of the file.

    Args:
        last: stop when the time stamp of this frame is settled: no later packet can be shown before it,
            because time stamps of decoding rise and a frame is not shown before it is decoded.
    """
    packets: list[_Packet] = []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard or packet.is_corrupt:
            continue
        packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
        if last is not None and len(packets) > last and len(packets) % 16 == 0 and packet.dts is not None:
            shown = sorted(p.pts for p in packets if p.pts is not None)
            if len(shown) > last and shown[last] < packet.dts:
                break
    return packets


def _count_in_index(stream: Any, file_bytes: int) -> int | None:
    """Frames listed by the container, or None where the list cannot be taken at its word."""
    entries = getattr(stream, "index_entries", None)  # from PyAV 17 on
    if entries is None or not stream.frames or len(entries) != stream.frames:
        return None
    for entry in entries:
        if entry.is_discard or not entry.size or entry.pos + entry.size > file_bytes:
            return None
    return stream.frames


def _frame_rate(stream: Any, packets: list[_Packet] | None) -> float:
    """Mean frames per second; NaN if nothing tells it.

    The header is believed if it is near the packets' mean, or near their usual distance: the mean suffers from
    a gap where a file was cut, the distance from time stamps in whole milliseconds.
    """
    header = float(stream.average_rate or stream.guessed_rate or math.nan)
    times = np.unique([p.pts for p in packets or () if p.pts is not None]) * float(stream.time_base or 0)
    if len(times) < 2 or times[-1] == times[0]:
        return header
    mean = (len(times) - 1) / (times[-1] - times[0])
    usual = 1 / np.median(np.diff(times))
    believed = any(abs(header - rate) <= _RATE_SLACK * rate for rate in (mean, usual))
    return header if believed else float(mean)


def _read_by_time(path: str | Path, container: Any, stream: Any, indices: list[int]) -> np.ndarray | None:
    """None where time stamps do not tell the frames apart, or one did not come."""
    if container.format.name == "avi":  # stores no times of display; libav's guess is wrong with B-frames
        return None
    packets = _scan(container, stream, last=max(indices))
    shown = sorted(p.pts for p in packets if p.pts is not None)
    if len(shown) < len(packets) or len(set(shown)) < len(shown):
        return None
    if len(shown) <= max(indices):
        raise BadSample(path, f"frame {max(indices)} (from 0) is wanted and the file has {len(shown)} frames")
    first, final = shown[min(indices)], shown[max(indices)]
    start = max((p.pts for p in packets if p.is_key and p.pts <= first), default=None)
    if start is None:
        return None
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(shown[index], []).append(place)
    # by time of display; should a format land one keyframe late, the first frame does not come and None is returned
    container.seek(start, stream=stream, backward=True)
    frames = _Frames(path, len(indices))
    for frame in _decode(container, stream):
        frames.put(frame, places.pop(frame.pts, ()))
        if not places or (frame.pts is not None and frame.pts > final):
            break
    return None if places else frames.whole


def _read_by_count(path: str | Path, container: Any, stream: Any, indices: list[int]) -> np.ndarray:
    frames, count = _Frames(path, len(indices)), 0
    for frame in _decode(container, stream):
        frames.put(frame, [place for place, index in enumerate(indices) if index == count])
        count += 1
        if count > max(indices):
            return frames.whole
    raise BadSample(path, f"frame {max(indices)} (from 0) is wanted and {count} frames can be decoded")


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1  # the loader runs a process per core already
    for packet in container.demux(stream):  # the last one is empty and makes the decoder give what it holds back
        if not packet.is_corrupt:  # half a packet at the end of a truncated file
            yield from packet.decode()


class _Frames:
    """Collects decoded frames as one array."""

    def __init__(self, path: str | Path, num_frames: int) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.path, self.num_frames = path, num_frames
        self.whole: np.ndarray | None = None
        self.reformatter = VideoReformatter()  # kept: it prepares the conversion once, not per frame
        self.options = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def put(self, frame: Any, places: Sequence[int]) -> None:
        if not places:
            return
        if frame.is_corrupt:
            raise BadSample(self.path, f"the frame at {float(frame.time or 0):.3f} s is damaged")
        picture = self.reformatter.reformat(frame, format="rgb24", **self.options).to_ndarray()
        picture = frame_turn(frame)(picture)
        if self.whole is None:
            self.whole = np.empty((self.num_frames, *picture.shape), np.uint8)
        if picture.shape != self.whole.shape[1:]:
            raise BadSample(self.path, f"the size changes from {self.whole.shape[1:3]} to {picture.shape[:2]} pixels")
        self.whole[list(places)] = picture


def _stored_turn(path: str | Path, container: Any, stream: Any) -> Turn:
    """From the container: libav's python side shows it on decoded frames only."""
    if "mp4" in container.format.name:
        with Path(path).open("rb") as file:
            return track_turn(file, stream.id)
    if "matroska" in container.format.name:  # rarely turned, and not by a field that is easy to find
        container.seek(0)
        return next((frame_turn(frame) for frame in _decode(container, stream)), Turn())
    return Turn()


def _probe_image(path: str | Path) -> VideoInfo:
    from PIL import Image

    _check_file(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise BadSample(path, f"not a readable image: {problem}") from problem
    if orientation in (5, 6, 7, 8):  # stored on its side
        height, width = width, height
    return VideoInfo(1, height, width, math.nan)
