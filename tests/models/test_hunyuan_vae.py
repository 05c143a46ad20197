"""The causal autoencoder reproduces the published one, whatever is cut into tiles, pieces or samples."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from opensora_like.models.autoencoders.hunyuan_layers import CausalConv3d, FrameCausalAttention, repeat_causal
from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE
from opensora_like.models.autoencoders.planning import measure, plan_encode
from opensora_like.models.autoencoders.tiling import Tiling
from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "block_out_channels": (4, 4, 8, 8)}
FACTS = json.loads((GOLDEN / "hunyuan_vae_a.json").read_text())
TILING_FACTS = json.loads((GOLDEN / "hunyuan_vae_tiling_a.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hunyuan_vae_a.safetensors")


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}


def tiny(weights, **arguments) -> HunyuanVAE:
    autoencoder = HunyuanVAE(**TINY, **arguments)
    autoencoder.load_state_dict(weights)
    return autoencoder


def pixels(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    return tensors[f"{key}/input_u8"].float() / 127.5 - 1


@pytest.mark.parametrize("case", FACTS["cases"], ids=lambda c: c["key"])
def test_codes_as_published(case, golden, weights):
    """Moments, latents and pixels are those that the published network gave for the same weights."""
    autoencoder, key = tiny(weights), case["key"]
    video = pixels(golden, key)
    torch.testing.assert_close(autoencoder.moments(video), golden[f"{key}/moments"], atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.encode(video), golden[f"{key}/z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.decode(golden[f"{key}/z"]), golden[f"{key}/decoded"], atol=1e-4, rtol=0)
    assert autoencoder.latent_shape(*video.shape[2:]) == tuple(golden[f"{key}/z"].shape[1:])


@pytest.mark.parametrize("case", TILING_FACTS["cases"], ids=lambda c: c["key"])
def test_tiles_as_published(case, weights):
    """Tiles in space, in time, in both, and slices of the batch give the published numbers, corners included."""
    tensors = load_file(GOLDEN / "hunyuan_vae_tiling_a.safetensors")
    autoencoder, key = tiny(weights, **case["overrides"]), case["key"]
    torch.testing.assert_close(autoencoder.encode(pixels(tensors, key)), tensors[f"{key}/z"], atol=1e-5, rtol=0)
    decoded = autoencoder.decode(tensors[f"{key}/z"])
    assert decoded.double().sum().item() == pytest.approx(case["decoded_sum"], abs=1e-5 * case["decoded_abs_sum"])
    stored = decoded if case["decoded_stored"] == "full" else decoded[..., ::2, ::2]
    torch.testing.assert_close(stored, tensors[f"{key}/decoded"], atol=1e-4, rtol=0)


def test_posterior_as_published(golden, weights, monkeypatch):
    """A sampled latent is scale * (mean + std * noise - shift)."""
    key = FACTS["cases"][-1]["key"]
    monkeypatch.setattr(torch, "randn", lambda shape, **_: golden["sample/normal"].reshape(shape))
    z = tiny(weights).latents_of(golden[f"{key}/moments"], torch.Generator())
    torch.testing.assert_close(z, golden["sample/z"], atol=1e-5, rtol=0)


def test_gradients_as_published(golden, weights):
    """Gradients of a reconstruction loss have the published norms, through rebuilt layers and in-place activations."""
    autoencoder = tiny(weights).requires_grad_(True)
    video = pixels(golden, FACTS["cases"][-1]["key"])
    loss = F.mse_loss(autoencoder.decode(autoencoder.encode(video)), video)
    loss.backward()
    assert loss.item() == pytest.approx(FACTS["recon_loss_last_case"], rel=1e-4)
    largest = max(FACTS["grad_norms_last_case"].values())
    for name, parameter in autoencoder.named_parameters():
        expected = FACTS["grad_norms_last_case"][name]
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=2e-3, abs=1e-5 * largest), name


def test_published_layout():
    """The default architecture has the published number of parameters and keys, and the names of the golden file."""
    with torch.device("meta"):
        autoencoder, small = HunyuanVAE(), HunyuanVAE(**TINY)
    assert sum(p.numel() for p in autoencoder.parameters()) == 246_478_803
    assert len(autoencoder.state_dict()) == 248
    shapes = {name: list(t.shape) for name, t in autoencoder.state_dict().items()}
    assert shapes["encoder.conv_out.conv.weight"] == [32, 512, 3, 3, 3]
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == [512, 512]
    assert shapes["post_quant_conv.weight"] == [16, 16, 1, 1, 1]
    assert {name: list(t.shape) for name, t in small.state_dict().items()} == FACTS["shapes"]


def test_meets_the_seam():
    """Built by its registered name it is a frozen `Autoencoder`."""
    autoencoder = build({"type": "hunyuan_vae", **FACTS["config"]}, MODELS)  # the published arguments, all of them
    assert isinstance(autoencoder, Autoencoder)
    assert (autoencoder.temporal_stride, autoencoder.spatial_stride, autoencoder.is_causal) == (4, 8, True)
    assert not any(p.requires_grad for p in autoencoder.parameters()) and not autoencoder.training


@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_other_ratios_are_those_of_diffusers(ratio):
    """Cells of other sizes give diffusers' numbers for the same weights, and sizes that follow from them."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(**TINY, spatial_compression_ratio=ratio).eval()
    ours = HunyuanVAE(**TINY, spatial_compression_ratio=ratio)
    ours.load_state_dict(theirs.state_dict())
    video = torch.rand(1, 3, 5, 16, 32) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(video).latent_dist.mean
        torch.testing.assert_close(ours.encode(video), ours.scale_factor * mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(ours.scale_factor * mean), theirs.decode(mean).sample, atol=1e-4, rtol=0)
    assert ours.latent_shape(5, 16, 32) == (4, 2, 16 // ratio, 32 // ratio)


def test_sampling_does_not_depend_on_slices(weights):
    """One generator serves the whole batch: the draw is the same however many samples are coded at a time."""
    video = torch.rand(3, 3, 5, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, *parts = (
        tiny(weights, **k).encode(video, torch.Generator().manual_seed(1))
        for k in ({}, {"use_slicing": True}, {"mini_batch_size": 2})
    )
    for part in parts:
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)
    assert (whole - tiny(weights).encode(video)).abs().max() > 0.1


def test_no_frame_sees_a_later_one(weights):
    """Changing the last frames changes no latent before them."""
    video = torch.rand(1, 3, 13, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = video.clone()
    changed[:, :, 9:] = 0
    # GroupNorm sums over time, also in the published network: causal are the convolutions and the attention.
    autoencoder = tiny(weights)
    for name, module in list(autoencoder.encoder.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(autoencoder.encoder.get_submodule(parent), leaf, nn.Identity())
    z, z_changed = autoencoder.encode(video), autoencoder.encode(changed)
    torch.testing.assert_close(z[:, :, :3], z_changed[:, :, :3])
    assert not torch.equal(z[:, :, 3], z_changed[:, :, 3])


def test_attention_equals_the_dense_mask(golden):
    """Attention to prefixes is attention under the published mask, without a tensor of all pairs of tokens."""
    torch.manual_seed(0)
    width, frames, height, side = 8, 5, 6, 7
    linears = [nn.Linear(width, width) for _ in range(4)]
    attention = FrameCausalAttention(nn.GroupNorm(2, width), *linears).requires_grad_(False)
    x = torch.randn(2, width, frames, height, side)
    tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
    q, k, v = (linear(tokens) for linear in linears[:3])
    frame = torch.arange(frames).repeat_interleave(height * side)
    mask = torch.where(frame[:, None] >= frame[None, :], 0.0, -math.inf)
    expected = linears[3](torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width) + mask, dim=-1) @ v)
    torch.testing.assert_close(attention(x), x + expected.transpose(1, 2).reshape_as(x))
    two = torch.arange(2).repeat_interleave(3)
    assert torch.equal(golden["causal_mask_2x3"][0], torch.where(two[:, None] >= two[None, :], 0.0, -math.inf))

    usage = measure(lambda: attention(torch.randn(1, width, 16, 16, 16)))
    assert usage.peak_bytes < (16 * 16 * 16) ** 2  # one byte per pair; the mask took two or four


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_convolution_in_pieces(stride, frames):
    """Cut into pieces of time a convolution gives the same, frame for frame; a piece may be one frame."""
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 5, 3, stride)
    x = torch.randn(2, 3, frames, 6, 8)
    whole = CausalConv3d(conv)(x)
    for max_elements in (1, 2000):
        torch.testing.assert_close(CausalConv3d(conv, max_elements=max_elements)(x), whole)
    assert whole.shape[2] == (frames - 1) // stride[0] + 1


def test_repeat_equals_interpolate():
    """Upsampling repeats every frame but the first, as nearest interpolation of the two parts does."""
    x = torch.randn(2, 3, 4, 5, 6)
    first, rest = x[:, :, :1], x[:, :, 1:]
    expected = [F.interpolate(first, scale_factor=(1.0, 2.0, 2.0)), F.interpolate(rest, scale_factor=(2.0, 2.0, 2.0))]
    assert torch.equal(repeat_causal(x, (2, 2, 2)), torch.cat(expected, dim=2))
    assert torch.equal(repeat_causal(first, (2, 2, 2)), expected[0])


def test_plan_is_what_runs(weights):
    """The plan, made without memory, is what a real run keeps alive; tiles and slices lower it."""
    video = torch.rand(2, 3, 5, 24, 24)
    peaks = []
    for options in ({}, {"use_slicing": True}, {"use_spatial_tiling": True, "sample_size": 16, "use_slicing": True}):
        with torch.device("meta"):
            planned = plan_encode(HunyuanVAE(**TINY, **options), 5, 24, 24, batch_size=2, dtype=torch.float32)
        autoencoder = tiny(weights, **options)
        measured = measure(lambda autoencoder=autoencoder: autoencoder.encode(video))
        assert planned.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
        assert planned.flops == pytest.approx(measured.flops, rel=0.02)  # attention on the CPU is not counted
        peaks.append(planned.peak_bytes)
    assert peaks[0] > 1.8 * peaks[1] > 1.8 * 2 * peaks[2]


def test_temporal_tiles_bound_the_memory():
    """With tiles in time the memory of a long clip grows by its latents only."""
    with torch.device("meta"):
        autoencoder = HunyuanVAE(**TINY, use_temporal_tiling=True, sample_tsize=16)
    short, long = (plan_encode(autoencoder, n, 64, 64, dtype=torch.float32) for n in (17, 129))
    assert long.peak_bytes - short.peak_bytes < 0.05 * short.peak_bytes
    assert long.flops > 5 * short.flops


def test_planning_refuses_real_weights():
    """Planning on a real device would compute and allocate: the error says how to build instead."""
    with pytest.raises(ValueError, match=r"on 'cpu'; build it under torch\.device\('meta'\)"):
        plan_encode(HunyuanVAE(**TINY), 1, 8, 8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((4, 16, 16), r"num_frames=4 is not 4 \* k \+ 1; nearest allowed: 1 or 5"),
        ((5, 20, 16), r"height=20 is not 8 \* k; nearest allowed: 16 or 24"),
        ((5, 16, 4), r"width=4 is not 8 \* k; nearest allowed: 8"),
    ],
)
def test_sizes_that_cannot_be_coded(size, message):
    """A size that would lose frames or pixels is an error with the nearest allowed sizes, before anything runs."""
    with torch.device("meta"):
        autoencoder = HunyuanVAE(**TINY)
        with pytest.raises(ValueError, match=message):
            autoencoder.encode(torch.empty(1, 3, *size))


def test_loads_exactly_its_file(tmp_path, weights):
    """A published file is loaded whole and cast; one that lacks, adds or reshapes keys is refused with the counts."""
    path = tmp_path / "vae.safetensors"
    save_file(weights, path)
    autoencoder = HunyuanVAE(str(path), **TINY, dtype="bf16")
    assert autoencoder.encode(torch.zeros(1, 3, 1, 8, 8)).dtype == torch.float32
    assert all(torch.equal(t, weights[n].bfloat16()) for n, t in autoencoder.state_dict().items())

    wrong = {**weights, "decoder.extra": torch.zeros(1), "quant_conv.bias": torch.zeros(3)}
    del wrong["encoder.conv_in.conv.bias"], wrong["encoder.conv_in.conv.weight"]
    save_file(wrong, path)
    with pytest.raises(ValueError, match=r"2 missing .*1 unexpected \['decoder\.extra'\], 1 of another shape"):
        HunyuanVAE(str(path), **TINY)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        HunyuanVAE(str(path), **TINY)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        HunyuanVAE(str(tmp_path / "none"), **TINY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_out_channels": (4, 4, 8)}, "must be four multiples"),
        (
            {"time_compression_ratio": 8},
            "time_compression_ratio=8, .*: the first can only be 4",
        ),
        ({"spatial_compression_ratio": 3}, "spatial_compression_ratio=3: .* the second 1, 2, 4, 8 or 16"),
        ({"mini_batch_size": 0}, "mini_batch_size=0 must be at least 1"),
        ({"mini_batch_size": 2, "use_slicing": True}, "contradicts use_slicing"),
        ({"use_spatial_tiling": True, "sample_size": 20}, "spatial tile size 20 is not a multiple of the stride 8"),
        ({"use_temporal_tiling": True, "sample_tsize": 4}, "would not advance"),
        ({"tile_overlap_factor": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    """A setting that cannot work is refused when the autoencoder is built."""
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        HunyuanVAE(**{**TINY, **arguments})


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.6])
def test_tiles_of_an_exact_code_are_seamless(overlap):
    """Where the code of a position does not depend on its surroundings, tiles change nothing, whatever their sizes."""
    tiling = Tiling(spatial_stride=2, temporal_stride=4, spatial_size=8, temporal_size=16, overlap=overlap)

    def encode(x):
        return F.avg_pool3d(x, (4, 2, 2))

    def decode(z):
        return z.repeat_interleave(4, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)

    for frames in (4, 16, 20, 28, 40, 52, 68):
        video = torch.randn(1, 2, frames, 22, 10)
        z = encode(video)
        torch.testing.assert_close(tiling.encode(encode, video), z)
        torch.testing.assert_close(tiling.decode(decode, z), decode(z))


def test_importing_needs_torch_alone():
    """The module is imported by the registry: diffusers only comes when an autoencoder is built."""
    code = "import sys; import opensora_like.models.autoencoders.hunyuan_vae; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("num_frames", [9, 33])
def test_the_folder_of_diffusers_is_read(tmp_path, num_frames):
    """Of a pipeline's folder the part of the autoencoder: names, latents and pixels, in tiles of time, too."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(**TINY).eval()
    theirs.save_pretrained(tmp_path / "vae")
    for source in (tmp_path, tmp_path / "vae"):
        ours = HunyuanVAE(str(source), **TINY, use_temporal_tiling=True, sample_tsize=16)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
    video = torch.rand(1, 3, num_frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mode() * theirs.config.scaling_factor
        torch.testing.assert_close(ours.encode(video), z, atol=1e-5, rtol=0)
        pixels = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(z), pixels, atol=1e-4, rtol=0)


def test_a_folder_that_does_not_fit_says_so(tmp_path):
    """Latents that are scaled otherwise or of other cells, and a folder without one file of weights."""
    from diffusers import AutoencoderKLHunyuanVideo

    for changed, message in (
        ({"scaling_factor": 0.5}, r"has scaling_factor=0\.5, autoencoder\.scale_factor=0\.476986"),
        ({"spatial_compression_ratio": 4}, r"ratio=4, autoencoder\.spatial_compression_ratio=8"),
    ):
        AutoencoderKLHunyuanVideo(**TINY, **changed).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            HunyuanVAE(str(tmp_path), **TINY)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has 0 safetensors files"):
        HunyuanVAE(str(tmp_path), **TINY)
