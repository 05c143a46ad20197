"""Measure how fast rows find their bucket, against a plain loop over rows in the same run.

python tools/bench_buckets.py [--rows 1000000] [--config configs/diffusion/train/stage1.py]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like.datasets.aspect import num_pixels, ratio_value, shape_table
from opensora_like.datasets.bucket import SMALLEST_SHARE, assign, compile_buckets
from opensora_like.rng import uniform

MULTIPLE = 16
FPS_MAX = 24
SEED = EPOCH = 0
# of configs/diffusion/train/stage1.py, for when no config is given
STAGE1 = {
    "256px": {
        1: (1.0, 45),
        **dict.fromkeys(range(5, 34, 4), (1.0, 12)),
        **dict.fromkeys(range(37, 66, 4), (1.0, 6)),
        **dict.fromkeys(range(69, 98, 4), (1.0, 4)),
        **dict.fromkeys(range(101, 130, 4), (1.0, 3)),
    },
    "768px": {1: (0.5, 13)},
    "1024px": {1: (0.5, 7)},
}


def make_columns(num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """num_frames, height, width, fps of a mixed table: 30% images, clips of 2 to 400 frames, up to 1200x2000."""
    rng = np.random.default_rng(0)
    image = rng.random(num_rows) < 0.3
    num_frames = np.where(image, 1, rng.integers(2, 400, num_rows))
    height, width = rng.integers(100, 1200, num_rows), rng.integers(100, 2000, num_rows)
    fps = np.where(image, np.nan, rng.choice([23.976, 24, 25, 29.97, 30, 60], num_rows))
    return num_frames, height, width, fps


def assign_row_by_row(columns: tuple[np.ndarray, ...], bucket_config: dict, num_rows: int) -> list:
    """The same rule and the same draws in plain Python, for float probabilities, on the first `num_rows` rows."""
    resolutions = []
    for name in sorted(bucket_config, key=num_pixels, reverse=True):
        ratios = {ratio: ratio_value(ratio) for ratio in shape_table(name, multiple=MULTIPLE)}
        frames = sorted(bucket_config[name], reverse=True)
        resolutions.append((name, SMALLEST_SHARE * num_pixels(name), frames, bucket_config[name], ratios))
    found = []
    for row, (frames, height, width, fps) in enumerate(zip(*(c[:num_rows].tolist() for c in columns), strict=True)):
        usable = frames if math.isnan(fps) or fps < FPS_MAX else frames // math.ceil(fps / FPS_MAX)
        found.append(_bucket_of_row(row, usable, height, width, resolutions))
    return found


def _bucket_of_row(row: int, usable: int, height: int, width: int, resolutions: list) -> tuple[str, int, str] | None:
    for name, smallest, counts, table, ratios in resolutions:
        if height * width < smallest:
            continue
        frames = next((n for n in counts if (n == 1 if usable == 1 else 1 < n <= usable)), None)
        if frames is None:
            continue
        keep = table[frames][0]
        if keep == 1 or uniform(SEED, f"bucket.keep/{name}", EPOCH, [row])[0] < keep:
            ratio = height / width
            return name, frames, min(ratios, key=lambda r: abs(ratio - ratios[r]))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--plain-rows", type=int, default=100_000, help="rows of the plain loop, which is slow")
    parser.add_argument("--config", help="read bucket_config from here; float probabilities only")
    args = parser.parse_args()
    bucket_config = STAGE1
    if args.config:
        from mmengine.config import Config

        bucket_config = Config.fromfile(args.config)["bucket_config"]
    buckets = compile_buckets(bucket_config, multiple=MULTIPLE)
    columns = make_columns(args.rows)
    fast, slow = math.inf, math.inf
    for _ in range(3):  # in turns, and the best of each: other work on the machine should hit neither
        start = time.perf_counter()
        ids = assign(*columns, buckets, fps_max=FPS_MAX, seed=SEED, epoch=EPOCH)
        middle = time.perf_counter()
        plain = assign_row_by_row(columns, bucket_config, args.plain_rows)
        fast = min(fast, (middle - start) / args.rows)
        slow = min(slow, (time.perf_counter() - middle) / len(plain))
    names = [(*buckets.shapes[i][:2], buckets.ratios[i]) if i >= 0 else None for i in ids[: len(plain)].tolist()]
    if names != plain:
        raise RuntimeError(f"{sum(a != b for a, b in zip(names, plain, strict=True))} rows differ from the plain loop")
    print(f"buckets {len(buckets)}  rows {args.rows}  with a bucket {np.mean(ids >= 0):.4f}")
    print(f"the plain loop gives the same bucket to each of {len(plain)} rows")
    print(f"vectorised {1 / fast:,.0f} rows/s  plain loop {1 / slow:,.0f} rows/s  ratio {slow / fast:.0f}")


if __name__ == "__main__":
    main()
