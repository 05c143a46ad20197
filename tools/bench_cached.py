"""What a step on cached latents costs beside the model: the loop against bare forward, backward and update, in one run.

python tools/bench_cached.py [--num_steps N] [--num_workers N]
A small Wan on latents and embeddings of random numbers, written to a store first; blocks of bare and of whole steps
alternate, so that both see the same machine; one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from opensora_like import runtime as rt
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.datasets.latent_store import StoreWriter, finish
from opensora_like.models.fingerprint import cache_fingerprint, latent_facts
from opensora_like.registry import MODELS, build
from opensora_like.rng import generator
from tools.bench_trainer import bare_seconds, build_silent, whole_seconds

AUTOENCODER = {"type": "wan_vae", "tiny": {}}
TEXT = {"type": "umt5", "tiny": {"hidden_size": 256}, "max_length": 128, "dtype": "fp32"}
MODEL = {"type": "wan", "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4}
MODEL |= {"in_channels": 16, "out_channels": 16, "text_dim": 256}
NUM_FRAMES, HEIGHT, WIDTH = 33, 112, 112
NUM_ENTRIES, NUM_BLOCKS = 64, 8


class Seconds(NamedTuple):
    """Seconds by the clock on the wall, and of this process on its processors, which others' work does not lengthen."""

    wall: float
    cpu: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def both_clocks() -> Seconds:
    """Now, on both clocks."""
    return Seconds(time.perf_counter(), time.process_time())


def write_store(folder: Path) -> None:
    """Entries as the encoders would make them, twice as long as the bucket, of random numbers."""
    facts = latent_facts(build(AUTOENCODER, MODELS, where="autoencoder"))
    with StoreWriter(folder, fingerprint=cache_fingerprint(AUTOENCODER, {"text": TEXT}, facts=facts)) as writer:
        writer.add_null({"text": torch.zeros(128, 256)})
        for number in range(NUM_ENTRIES):
            draw = generator(0, "bench", number)
            tensors = {"latents": torch.randn(16, 17, HEIGHT // 8, WIDTH // 8, generator=draw)}
            tensors["embeddings.text"] = torch.randn(128, 256, generator=draw)
            sizes = {"num_frames": 65, "height": HEIGHT, "width": WIDTH, "fps": 16.0}
            writer.add(f"clip{number:03d}", tensors, {"path": f"{number}.mp4", "text": "a clip", **sizes})
    finish(folder)


def settings(folder: Path, *, num_workers: int) -> dict[str, Any]:
    """A run on the store: dropped captions, float32, AdamW."""
    return {
        "model": MODEL,
        "autoencoder": AUTOENCODER,
        "encoders": {"text": TEXT},
        "dataset": {"type": "latents", "cache_path": str(folder / "store")},
        "bucket_config": {f"{HEIGHT}x{WIDTH}": {NUM_FRAMES: (1.0, 1)}},
        "booster": {"type": "ddp"},
        "optim": {"type": "AdamW", "lr": 1e-4},
        "dropout_ratio": {"text": 0.1},
        "sample_posterior": False,
        "dtype": "fp32",
        "num_workers": num_workers,
        "tensorboard": False,
        "outputs": str(folder),
        "exp_name": "bench",
    }


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(prog="bench_cached.py", description=__doc__)
    parser.add_argument("--num_steps", type=int, default=48, help="of each kind; default 48")
    parser.add_argument("--num_workers", type=int, default=1, help="of the loader; default 1")
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp())
    write_store(folder / "store")
    written = settings(folder, num_workers=given.num_workers)
    (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in written.items()))
    config = read_config(folder / "config.py").config
    run = build_silent(config, rt.start(), config_name="bench")

    def work() -> int:
        block = max(1, given.num_steps // NUM_BLOCKS)
        bare_seconds(run, 2), whole_seconds(run, 2)  # warm up
        pairs = [
            (bare_seconds(run, block, clock=both_clocks), whole_seconds(run, block, clock=both_clocks))
            for _ in range(NUM_BLOCKS)
        ]
        for kind in ("wall", "cpu"):
            bare, whole = (statistics.median(getattr(s, kind) for s in side) for side in zip(*pairs, strict=True))
            print(
                f"{kind}: bare model {1000 * bare / block:.1f} ms, whole step {1000 * whole / block:.1f} ms, "
                f"{whole / bare - 1:+.1%} (medians of {NUM_BLOCKS} blocks of {block} steps each)"
            )
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
