"""The autoencoder of Wan 2.2 TI2V-5B: its sizes and norm, diffusers' numbers, and every form of its weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.base import Autoencoder
from opensora_like.models.fingerprint import encoder_fingerprint


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(version="2.2", tiny={})


def clip(num_frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height, width, generator=torch.Generator().manual_seed(num_frames)) * 2 - 1


def test_sizes(vae: WanVAE) -> None:
    """48 channels, 4x16x16; the first frame alone; nothing of a clip is lost on the way back."""
    assert isinstance(vae, Autoencoder)
    assert (vae.latent_channels, vae.temporal_stride, vae.spatial_stride) == (48, 4, 16)
    assert vae.latent_shape(121, 704, 1280) == (48, 31, 44, 80)
    with pytest.raises(ValueError, match=r"height=40 is not 16 \* k"):
        vae.latent_shape(5, 40, 32)
    z = vae.encode(clip())
    assert z.shape == (1, 48, 2, 2, 3) and vae.decode(z).shape == clip().shape
    torch.testing.assert_close(vae.encode(clip()[:, :, :1]), z[:, :, :1], atol=1e-5, rtol=1e-5)


def test_latents_are_normed_as_diffusers_does(vae: WanVAE) -> None:
    """(mean - latents_mean) / latents_std of the published config, and back."""
    mean, std = (torch.tensor(vae.model.config[f"latents_{name}"]).view(1, 48, 1, 1, 1) for name in ("mean", "std"))
    assert (mean[0, 0].item(), mean[0, -1].item()) == pytest.approx((-0.2289, -0.0667))
    assert (std[0, 0].item(), std[0, -1].item()) == pytest.approx((0.4765, 0.7744))
    published = vae.model.encode(clip()).latent_dist.mode()
    torch.testing.assert_close(vae.encode(clip()), (published - mean) / std, atol=1e-5, rtol=1e-5)
    z = vae.encode(clip())
    torch.testing.assert_close(vae.decode(z), vae.model.decode(z * std + mean).sample, atol=1e-5, rtol=0)


def test_published_sizes_without_reading() -> None:
    """On meta it has the sizes of the published file."""
    with torch.device("meta"):
        large = WanVAE(version="2.2")
    config = large.model.config
    assert (config.base_dim, config.decoder_base_dim, config.z_dim, large.spatial_stride) == (160, 256, 48, 16)
    assert sum(p.numel() for p in large.parameters()) == 704_688_668


def original_name(name: str) -> str:
    """The original file's name of a weight."""
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    name = re.sub(r"\b(norm1|conv1|norm2|conv2)\.", lambda m: inner[m[1]] + ".", name)
    name = name.replace("conv_shortcut", "shortcut").replace("mid_block.attentions.0", "middle.1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = re.sub(r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1samples.\2.\1samples.\3", name)
    name = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2", name)
    name = re.sub(r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3", name)
    name = re.sub(r"(coder)\.conv_in", r"\1.conv1", name)
    name = re.sub(r"(coder)\.norm_out", r"\1.head.0", name)
    name = re.sub(r"(coder)\.conv_out", r"\1.head.2", name)
    return re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))


def test_every_form_of_weights_loads(tmp_path: Path) -> None:
    """A diffusers folder, and single files of either naming; the other version is refused."""
    source = WanVAE(version="2.2", tiny={"num_res_blocks": 2})
    source.model.save_pretrained(tmp_path / "pipe" / "vae")
    weights = source.model.state_dict()
    save_file(weights, tmp_path / "own.safetensors")
    original = {original_name(name): tensor for name, tensor in weights.items()}
    assert "decoder.upsamples.0.upsamples.3.time_conv.weight" in original and len(original) == len(weights)
    torch.save(original, tmp_path / "Wan2.2_VAE.pth")
    want = source.encode(clip())
    for path in ("pipe", "own.safetensors", "Wan2.2_VAE.pth"):
        loaded = WanVAE(str(tmp_path / path), version="2.2")
        assert torch.equal(loaded.encode(clip()), want), path
        assert torch.equal(loaded.decode(want), source.decode(want)), path
        with pytest.raises(ValueError, match=r"is of version='2.2', and version='2.1'; set autoencoder.version"):
            WanVAE(str(tmp_path / path))


def test_tiles() -> None:
    """Tiles change what lies in more than one of them only."""
    whole = WanVAE(version="2.2", tiny={})
    tiled = WanVAE(version="2.2", tiny={}, use_tiling=True, tile_size=32, tile_stride=16)
    video = clip(1, 32, 112)
    z = tiled.encode(video)
    assert z.shape == whole.encode(video).shape and tiled.decode(z).shape == video.shape
    assert not torch.equal(z, whole.encode(video))


def test_a_store_knows_the_version_by_the_weights() -> None:
    """Stores that were made before there were two stay valid; those of the other autoencoder are told apart."""
    plain = {"type": "wan_vae", "tiny": {}}
    found = encoder_fingerprint(plain, where="autoencoder")
    assert found == encoder_fingerprint(plain | {"version": "2.1"}, where="autoencoder") and "version" not in str(found)
    assert found != encoder_fingerprint(plain | {"version": "2.2"}, where="autoencoder")
