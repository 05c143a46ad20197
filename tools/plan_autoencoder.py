"""Predict memory and work of an autoencoder for one size of clip, untiled and tiled; needs no weights and no GPU.

python tools/plan_autoencoder.py hunyuan_vae --height 576 --width 1024 --num-frames 129
python tools/plan_autoencoder.py dc_ae --set spatial_tile_size=512
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like.models.autoencoders.loading import DTYPES
from opensora_like.models.autoencoders.planning import plan_decode, plan_encode
from opensora_like.registry import MODELS, build

TILINGS = {"none": (False, False), "space": (True, False), "time": (False, True), "both": (True, True)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("hunyuan_vae", "dc_ae"))
    parser.add_argument("--num-frames", type=int, help="default: 129 of a causal autoencoder, else 128")
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the autoencoder"
    )
    return parser.parse_args()


def read_settings(items: list[str]) -> dict[str, Any]:
    """``key=literal`` -> arguments; what is no literal is text."""
    settings = {}
    for item in items:
        key, sep, raw = item.partition("=")
        if not sep:
            raise SystemExit(f"--set {item!r} is not of the form key=value")
        try:
            settings[key] = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            settings[key] = raw
    return settings


def main() -> None:
    args = parse_arguments()
    settings = read_settings(args.set)
    if fixed := {"dtype", "from_pretrained", "use_spatial_tiling", "use_temporal_tiling"} & settings.keys():
        raise SystemExit(f"--set {sorted(fixed)}: the tool sets these itself")
    print(f"{'tiling':<8}{'encode GiB':>12}{'TFLOP':>10}{'decode GiB':>12}{'TFLOP':>10}")
    for name, (space, time) in TILINGS.items():
        tiling = {"use_spatial_tiling": space, "use_temporal_tiling": time}
        config = {"type": args.name, "dtype": args.dtype, **tiling, **settings}
        with torch.device("meta"):
            autoencoder = build(config, MODELS, where="autoencoder")
        frames = args.num_frames or (129 if autoencoder.is_causal else 128)
        size = (frames, args.height, args.width)
        usages = [
            plan(autoencoder, *size, batch_size=args.batch_size, dtype=DTYPES[args.dtype])
            for plan in (plan_encode, plan_decode)
        ]
        cells = "".join(f"{u.peak_bytes / 2**30:>12.2f}{u.flops / 1e12:>10.1f}" for u in usages)
        print(f"{name:<8}{cells}", flush=True)
    weights = sum(p.numel() * p.element_size() for p in autoencoder.parameters())
    print(
        f"{frames}x{args.height}x{args.width}, batch {args.batch_size}, {args.dtype}; on top of weights "
        f"({weights / 2**30:.2f} GiB), the input, and the work space of the kernels"
    )


if __name__ == "__main__":
    main()
