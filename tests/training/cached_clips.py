"""A small table of real clips and images, an autoencoder in a file, and the settings that train on them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from opensora_like.config import read_config
from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE
from opensora_like.settings import RunConfig
from tests.make_clips import numbered_frames, write_clip

CONFIG = Path(__file__).parent / "toy_config.py"
SIZES = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "block_out_channels": (4, 4, 4, 4)}
BUCKETS = {"32px_ar1:1": {1: (1.0, 2), 5: (1.0, 2), 9: ((1.0, 0.5), 2)}}
COMMON = ["--max_bad_fraction", "0.5", "--accumulation_steps", "2", "--steps", "8"]


def write_table(folder: Path, *, num_clips: int = 12, num_images: int = 4) -> Path:
    """Clips of 9 to 14 frames, so that some can be cut in several ways, and images, and one file that is missing."""
    import av

    rows = ["path,text,num_frames,height,width,fps"]
    for number in range(num_clips):
        frames = numbered_frames(9 + number % 6, 32, 32)
        frames[..., number % 3] //= 1 + number % 5
        write_clip(folder / f"clip{number}.mp4", frames, fps=8)
        rows.append(f"clip{number}.mp4,clip {number},{len(frames)},32,32,8")
    for number in range(num_images):
        picture = numbered_frames(num_clips + number + 1, 32, 32)[-1]
        av.VideoFrame.from_ndarray(picture, format="rgb24").to_image().save(folder / f"image{number}.png")
        rows.append(f"image{number}.png,image {number},1,32,32,")
    rows.append("gone.mp4,a clip that is not there,9,32,32,8")
    table = folder / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def write_autoencoder(path: Path) -> Path:
    """A HunyuanVAE of a few thousand weights in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(HunyuanVAE(**SIZES).state_dict(), path)
    return path


def hunyuan(path: Path) -> list[str]:
    """Settings of a run with the autoencoder of `write_autoencoder`."""
    section = {"type": "hunyuan_vae", "from_pretrained": str(path), **SIZES, "mini_batch_size": 1}
    return ["--autoencoder", repr(section), "--bucket_config", repr(BUCKETS), "--model.in_channels", "4", *COMMON]


def patch() -> list[str]:
    """Settings of a run with the parameter-free autoencoder."""
    section = {"type": "patch", "patch_size": 4, "temporal_stride": 4}
    return ["--autoencoder", repr(section), "--bucket_config", repr(BUCKETS), "--model.in_channels", "192", *COMMON]


def from_videos(table: Path) -> list[str]:
    """The dataset that reads and encodes."""
    return ["--dataset", repr({"type": "video_text", "data_path": str(table)})]


def from_cache(folder: Path, table: Path | None) -> list[str]:
    """The dataset that reads what was encoded."""
    section = {"type": "latents", "cache_path": str(folder)}
    return ["--dataset", repr(section | ({"data_path": str(table)} if table else {}))]


def config_of(*arguments: str) -> RunConfig:
    """The toy config with these settings."""
    return read_config(CONFIG, arguments).config
