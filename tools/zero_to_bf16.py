"""Turn a training checkpoint, of any booster, into bfloat16 safetensors for inference and other programs.

python tools/zero_to_bf16.py CHECKPOINT OUT [--max_shard_size 80GB] [--safe_serialization] [--ema] [--tag NAME]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.export import checkpoint_weights, export_weights, parse_size
from opensora_like.cli import run_guarded


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder (its newest one)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_shard_size", default="80GB", help="bytes, or with KB, MB, GB, KiB, MiB, GiB")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors: the only form there is")
    parser.add_argument("--ema", action="store_true", help="the moving average instead of the weights")
    parser.add_argument("-t", "--tag", help="name of the checkpoint in a run's folder")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    given = parser.parse_args(arguments)
    source = Path(given.checkpoint) / given.tag if given.tag else Path(given.checkpoint)
    folder = layout.find_checkpoint(str(source), source)
    weights = checkpoint_weights(folder, use_ema=given.ema)
    max_shard_size = parse_size(given.max_shard_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]

    def work() -> int:
        export_weights(
            weights, given.out, max_shard_size=max_shard_size, dtype=dtype, on_file=lambda path: print(f"wrote {path}")
        )
        shutil.copyfile(folder / "config.py", given.out / "config.py")
        print(f"{len(weights)} tensors of {folder} in {given.dtype}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
