"""Print the bucket_config of what VideoX-Fun's flags of sizes and token length mean.

python tools/token_buckets.py --image_sample_size 1024 --video_sample_size 256 --token_sample_size 512 \\
    --video_sample_n_frames 49 [--train_batch_size 1] [--published_shapes 16]

The frames at each size are those of the documents: 512 with 49 frames gives 49, 768 gives 21, 1024 gives 9. Without
--image_sample_size, as FantasyTalking's commands have it, there are no images, and --video_sample_size is the largest
square, 256 the smallest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from opensora_like.cli import run_guarded
from opensora_like.datasets.token_budget import bucket_config_of


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_sample_size", type=int, help="side of the largest square, pixels; see above")
    parser.add_argument("--video_sample_size", type=int, required=True, help="side of the smallest square, pixels")
    parser.add_argument("--token_sample_size", type=int, required=True, help="side at which a clip has all frames")
    parser.add_argument("--video_sample_n_frames", type=int, required=True)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument(
        "--published_shapes",
        type=int,
        metavar="MULTIPLE",
        help="list the published shapes, sides multiples of 16 (TI2V-5B: 32); without it shapes are this program's",
    )
    given = parser.parse_args(arguments)
    config = bucket_config_of(
        image_size=given.image_sample_size,
        video_size=given.video_sample_size,
        token_size=given.token_sample_size,
        num_frames=given.video_sample_n_frames,
        batch_size=given.train_batch_size,
        multiple=given.published_shapes,
    )

    def work() -> int:
        print('bucket_config = {\n    "_delete_": True,')
        for name, frames in config.items():
            print(f"    {name!r}: {frames!r},".replace("'", '"'))
        print("}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
