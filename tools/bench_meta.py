"""How fast clips are measured and windows are read: python tools/bench_meta.py [--num_clips 20] [--num_frames 480]

Makes its own clips in a temporary folder, and prints files per second of measuring from headers, of counting packets
and of decoding, and clips per second of reading a window and of decoding the whole file for it. One process and one
decoder thread throughout; every file is read once before, so that the disk does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # works from a checkout that is not installed
    sys.path.insert(0, ROOT)

from opensora_like.datasets.video_io import probe, read_frames  # noqa: E402
from opensora_like.datasets.video_writing import write_video  # noqa: E402

WINDOW = 33


def moving_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """A pattern that drifts over a noisy ground, uint8 [T, H, W, 3], so that the coder has something to code."""
    ground = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [(np.sin((x + 3 * t) / 17) * np.cos((y - t) / 11) * 90 + 95).astype(np.uint8) for t in range(num_frames)]
    return np.stack([ground + wave[..., None] for wave in waves])


def decode_all(path: Path) -> np.ndarray:
    """Every frame of a file as one array: what a reader that does not seek has to do."""
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rate(work: Callable[[Path], object], paths: Iterable[Path]) -> float:
    """Files per second; the first is done once before."""
    paths = list(paths)
    work(paths[0])
    begin = time.perf_counter()
    for path in paths:
        work(path)
    return len(paths) / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_clips", type=int, default=20)
    parser.add_argument("--num_frames", type=int, default=480, help="of each clip, at 24 per second")
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=640)
    options = parser.parse_args()
    if options.num_frames < WINDOW or options.num_clips < 1:
        parser.error(f"--num_frames must be {WINDOW} or more and --num_clips 1 or more")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        frames = moving_frames(min(options.num_frames, 96), options.height, options.width)
        frames = frames[np.arange(options.num_frames) % len(frames)]
        first = Path(folder) / "0.mp4"
        write_video(first, frames, 24)
        headers = [Path(folder) / f"{i}.mp4" for i in range(options.num_clips)]
        for path in headers[1:]:
            path.write_bytes(first.read_bytes())
        cut = [path.with_suffix(".cut.mp4") for path in headers]
        for path in cut:  # an index that names more than there is makes `probe` count packets
            path.write_bytes(first.read_bytes()[:-100])
        few = headers[: max(1, options.num_clips // 4)]

        def window(path: Path) -> np.ndarray:
            begin = int(rng.integers(0, options.num_frames - WINDOW + 1))
            return read_frames(path, range(begin, begin + WINDOW))

        size = f"{options.num_frames} frames of {options.width}x{options.height}, {first.stat().st_size / 1e6:.1f} MB"
        print(f"{options.num_clips} clips of {size}")
        print(f"measure from headers   {rate(probe, headers):9.1f} files/s")
        print(f"measure by packets     {rate(probe, cut):9.1f} files/s")
        whole = rate(decode_all, few)
        print(f"measure by decoding    {whole:9.2f} files/s")
        print(f"read {WINDOW} frames         {rate(window, headers):9.2f} clips/s")
        print(f"decode all for them    {whole:9.2f} clips/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
