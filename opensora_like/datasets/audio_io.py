"""Read a stretch of sound from a file: only what is wanted is decoded, and it begins at the sample it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opensora_like.datasets.video_io import BadSample, open_container

SAMPLE_RATE = 16_000  # of all sound here, samples per second
_RUN_IN_SECONDS = 0.25  # decoded before what is wanted: codecs and the resampler need some to settle
_MICROSECONDS = 1_000_000  # of libav's times of whole files


def read_sound(
    path: str | Path,
    start_seconds: float,
    num_samples: int,
    *,
    rate: int = SAMPLE_RATE,
    may_lack_seconds: float = 0.0,
    timeout_seconds: float = 30.0,
) -> np.ndarray:
    """Sound as one channel, from any file with a sound track.

    The file is entered a little before the start, and left behind the end: what it costs does not depend on how long
    the file is. Times count from the beginning of the file, so that sound and pictures of one file stay together; a
    track that begins later is silent before.

    Args:
        start_seconds: of the first sample, 0 or more.
        rate: samples per second of what is returned.
        may_lack_seconds: how much may be missing at the end, which is then silent.

    Returns: float32 [num_samples] in [-1, 1].

    Raises:
        BadSample: missing, not a sound file, damaged, or ending before.
    """
    if start_seconds < 0 or num_samples < 1:
        raise ValueError(f"start_seconds={start_seconds!r} must be 0 or more, num_samples={num_samples!r} 1 or more")
    stop_seconds = start_seconds + num_samples / rate
    with open_container(path, kind="a sound file", timeout_seconds=timeout_seconds) as container:
        first, sound = _decode(path, container, start_seconds, stop_seconds, rate=rate)
    out = np.zeros(num_samples, np.float32)
    offset = round((start_seconds - first) * rate)  # of the wanted in what was decoded
    wanted = sound[max(offset, 0) : max(offset + num_samples, 0)]
    begin = max(-offset, 0)
    out[begin : begin + len(wanted)] = wanted
    lacking = num_samples - begin - len(wanted)
    if lacking > may_lack_seconds * rate + 0.5 or not len(wanted):
        end = sound_seconds(path, timeout_seconds=timeout_seconds)
        raise BadSample(
            path, f"its sound ends at {end:.3f} s, and {start_seconds:.3f} to {stop_seconds:.3f} s are wanted"
        )
    return out


def sound_seconds(path: str | Path, *, timeout_seconds: float = 30.0) -> float:
    """How long the sound of a file is.

    Raises:
        BadSample: as `read_sound`.
    """
    with open_container(path, kind="a sound file", timeout_seconds=timeout_seconds) as container:
        stream = _sound_stream(path, container)
        if stream.duration:
            return float(stream.duration * stream.time_base)
        ends = [(p.pts + (p.duration or 0)) * stream.time_base for p in container.demux(stream) if p.pts is not None]
        return float(max(ends, default=0))


def _sound_stream(path: str | Path, container: Any) -> Any:
    if not container.streams.audio:
        raise BadSample(path, f"no sound in it, only {sorted({s.type for s in container.streams})}")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise BadSample(path, "its sound codec is not one that this build of libav can decode")
    return stream


def _decode(
    path: str | Path, container: Any, start_seconds: float, stop_seconds: float, *, rate: int
) -> tuple[float, np.ndarray]:
    """What lies around a stretch, resampled: the time of the first sample, and the samples."""
    import av

    stream = _sound_stream(path, container)
    zero = (container.start_time or 0) / _MICROSECONDS
    enter = start_seconds - _RUN_IN_SECONDS
    if enter > 0:
        container.seek(int((enter + zero) / stream.time_base), stream=stream, backward=True)
    resampler = av.AudioResampler(format="fltp", rate=rate)  # of libav's own mixing a mean is not sure
    first: float | None = None
    parts: list[np.ndarray] = []
    for frame in _frames(container, stream):
        time = 0.0 if frame.pts is None else float(frame.pts * frame.time_base) - zero
        if time + frame.samples / frame.sample_rate <= enter:
            continue
        if time >= stop_seconds + _RUN_IN_SECONDS:
            break
        if first is None:
            first = time
        parts += [out.to_ndarray().mean(axis=0) for out in resampler.resample(frame)]
    if first is None:
        return start_seconds, np.zeros(0, np.float32)
    parts += [out.to_ndarray().mean(axis=0) for out in resampler.resample(None)]
    return first, np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    stream.codec_context.thread_count = 1  # the loader runs a process per core already
    for packet in container.demux(stream):
        yield from packet.decode()
