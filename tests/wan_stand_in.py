"""Tiny random Wan pipelines on disk, in the layout of the published ones."""

from __future__ import annotations

from pathlib import Path

import torch

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
I2V = {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24}


def write_transformer(folder: Path, **more: int) -> None:
    """A denoiser whose velocities are not small."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(**TRANSFORMER, **more)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    transformer.save_pretrained(folder)


def write_pipeline(folder: Path) -> Path:
    """Text to video: text_encoder/, tokenizer/, transformer/ and vae/. Returns: `folder`."""
    from diffusers import AutoencoderKLWan

    from tests.models.test_umt5 import saved

    saved(folder, parts=True)
    torch.manual_seed(1)
    write_transformer(folder / "transformer")
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(folder / "vae")
    return folder
