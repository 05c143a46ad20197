"""The deep-compression autoencoder reproduces the published one, and repairs its tiles in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from opensora_like.models.autoencoders.dc_ae import DCAE
from opensora_like.models.autoencoders.dc_ae_layers import ChannelRMSNorm, relu_attention, shuffle, unshuffle
from opensora_like.models.autoencoders.planning import measure, plan_decode, plan_encode
from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build

GOLDEN = Path(__file__).parents[1] / "golden"
VIDEO = {"model_name": "dc-ae-f4t4c8", "scaling_factor": 1.0}
IMAGE = {
    "model_name": "dc-ae-f4t4c8",
    "widths": (8, 32, 32),
    "blocks": ("ResBlock", "EViT_GLU", "EViTS5_GLU"),
    "temporal_levels": (False, False, False),
    "is_video": False,
    "downsample": "pixel_unshuffle",
    "upsample": "pixel_shuffle",
    "scaling_factor": 0.5,
}
RECORDED = {"dc_ae_a": VIDEO, "dc_ae_image_a": IMAGE}
FACTS = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in RECORDED}
CASES = [(name, case) for name in RECORDED for case in FACTS[name]["cases"]]


def recorded(name: str, **arguments) -> tuple[DCAE, dict[str, torch.Tensor]]:
    """The autoencoder with the recorded weights, and what was recorded with it; images are clips of one frame."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    autoencoder = DCAE(**RECORDED[name], **arguments)
    autoencoder.load_state_dict({k.removeprefix("weights/"): t for k, t in tensors.items() if k.startswith("weights/")})
    return autoencoder, {k: t[:, :, None] if t.ndim == 4 else t for k, t in tensors.items()}


def pixels(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    return tensors[f"{key}/input_u8"].float() / 127.5 - 1


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c['key']}" for n, c in CASES])
def test_codes_as_published(name, case):
    """Latents and pixels, tiled or not, of a clip or of images, are the recorded ones for the same weights."""
    autoencoder, tensors = recorded(name, **case.get("over", {}))
    if "error" in case:
        with pytest.raises(ValueError, match=r"num_frames=5 is not 4 \* k or 1; nearest allowed: 4 or 8"):
            autoencoder.encode(torch.zeros(case["shape"]))
        return
    key = case["key"]
    z = tensors[f"{key}/z"]
    video = pixels(tensors, key)
    torch.testing.assert_close(autoencoder.encode(video), z, atol=1e-4 * z.abs().max().item(), rtol=0)
    assert autoencoder.latent_shape(*video.shape[2:]) == tuple(z.shape[1:])

    decoded, expected = autoencoder.decode(z), tensors[f"{key}/decoded"]
    if case.get("decoded_stored", "full") != "full":
        decoded = decoded[..., ::2, ::2]
    if expected.shape[2] == 25:
        # Published: the last tile, one latent frame, comes out as an image, so 28 frames return as 25; and the 25th,
        # blended with weight zero, is in truth frame 28.
        assert decoded.shape[2] == video.shape[2] == 28
        torch.testing.assert_close(decoded[:, :, 27], expected[:, :, 24], atol=1e-4, rtol=0)
        decoded, expected = decoded[:, :, :24], expected[:, :, :24]
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


def test_published_layout():
    """The default architecture has the published numbers of parameters and keys; small ones have the recorded names."""
    with torch.device("meta"):
        autoencoder = DCAE()
        small = {name: DCAE(**arguments) for name, arguments in RECORDED.items()}
        image = DCAE("dc-ae-f32c32")
    for network, parameters, keys in ((autoencoder.encoder, 220_439_936, 161), (autoencoder.decoder, 239_022_211, 178)):
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert len(network.state_dict()) == keys
    for name, module in small.items():
        assert {k: list(t.shape) for k, t in module.state_dict().items()} == FACTS[name]["shapes"]
    assert autoencoder.latent_shape(128, 768, 1344) == (128, 32, 24, 42)
    assert (image.temporal_stride, image.spatial_stride, image.latent_channels) == (1, 32, 32)


@pytest.mark.parametrize("frames", [1, 8, 28, 36, 60])
@pytest.mark.parametrize("tiled", [False, True])
def test_frames_come_back(frames, tiled):
    """A clip of one frame, or of eight and more, is decoded to as many frames, also where tiles leave a short rest."""
    with torch.device("meta"):
        autoencoder = DCAE("dc-ae-f4t4c8", use_temporal_tiling=tiled, temporal_tile_size=16)
        video = torch.empty(1, 3, frames, 8, 8)
        assert autoencoder.decode(autoencoder.encode(video)).shape == video.shape


def test_scaling_holds_in_both_directions():
    """The factor divides on the way in and multiplies on the way out, so a round trip does not depend on it."""
    torch.manual_seed(0)
    one, other = DCAE(**VIDEO), DCAE("dc-ae-f4t4c8", scaling_factor=0.493)
    other.load_state_dict(one.state_dict())
    video = torch.rand(2, 3, 8, 8, 8) * 2 - 1
    torch.testing.assert_close(other.encode(video), one.encode(video) / 0.493)
    torch.testing.assert_close(other.decode(other.encode(video)), one.decode(one.encode(video)))
    with torch.device("meta"):
        assert DCAE().config.scaling_factor == 0.493


def test_mini_batches_change_nothing():
    """Samples are coded alike, one at a time or together, with a generator or without."""
    torch.manual_seed(0)
    whole, parts = DCAE(**VIDEO), DCAE(**VIDEO, mini_batch_size=1)
    parts.load_state_dict(whole.state_dict())
    video = torch.rand(3, 3, 8, 8, 8)
    torch.testing.assert_close(parts.encode(video, torch.Generator()), whole.encode(video))


def test_tile_sizes_are_derived():
    """Any tile size gives matching latent tiles in both directions; a size that cannot is refused."""
    with torch.device("meta"):
        autoencoder = DCAE(
            use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=384, temporal_tile_size=64
        )
        tiling = autoencoder.tiling
        assert tiling._span(tiling.spatial_size, 32, True) == (384, 288, 9, 3)
        assert tiling._span(tiling.spatial_size, 32, False) == (12, 9, 288, 96)
        assert tiling._span(tiling.temporal_size, 4, False) == (16, 12, 48, 16)
        assert autoencoder.encode(torch.empty(1, 3, 128, 416, 800)).shape == (1, 128, 32, 13, 25)
        with pytest.raises(ValueError, match="spatial tile size 200 is not a multiple of the stride 32"):
            DCAE(use_spatial_tiling=True, spatial_tile_size=200)


def test_attention_is_the_quadratic_one():
    """The linear form equals the explicit sum over all pairs of tokens."""
    q, k, v = torch.randn(3, 2, 3, 16, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    pairs = q.relu().transpose(-1, -2) @ k.relu()
    expected = v @ (pairs / pairs.sum(-1, keepdim=True)).transpose(-1, -2)
    torch.testing.assert_close(relu_attention(q, k, v), expected)


def test_shuffles_are_those_of_torch():
    """Blocks and channels are exchanged as torch does it for images, and back again for clips."""
    image, clip = torch.randn(2, 8, 4, 6), torch.randn(2, 8, 4, 6, 2)
    assert torch.equal(unshuffle(image, (2, 2)), F.pixel_unshuffle(image, 2))
    assert torch.equal(shuffle(image, (2, 2)), F.pixel_shuffle(image, 2))
    assert torch.equal(shuffle(unshuffle(clip, (2, 2, 2)), (2, 2, 2)), clip)


def test_bfloat16_stays_close():
    """In bfloat16 the latents keep the precision of that type, though attention sums over every token of the clip."""
    whole, tensors = recorded("dc_ae_a")
    half, _ = recorded("dc_ae_a", dtype="bf16")
    key = "case/1x3x8x16x12"
    z, z_half = whole.encode(pixels(tensors, key)), half.encode(pixels(tensors, key))
    assert z_half.dtype == torch.float32 and half.decode(z_half).dtype == torch.bfloat16
    assert (z - z_half).norm() < 0.05 * z.norm()

    norm, x = ChannelRMSNorm(16), torch.randn(2, 16, 3, 4, 5)
    torch.testing.assert_close(norm.to(torch.bfloat16)(x.bfloat16()).float(), norm.float()(x), atol=0.03, rtol=0.02)


def test_plan_is_what_runs():
    """The plan is what a real run keeps alive, in both directions; tiles lower it."""
    video = torch.rand(1, 3, 8, 64, 64)
    peaks = []
    for tiling in ({}, {"use_spatial_tiling": True, "spatial_tile_size": 32}):
        with torch.device("meta"):
            planned = DCAE(**VIDEO, **tiling)
        autoencoder = DCAE(**VIDEO, **tiling)
        z = autoencoder.encode(video)
        for plan, run in (
            (plan_encode, lambda ae=autoencoder: ae.encode(video)),
            (plan_decode, lambda ae=autoencoder, z=z: ae.decode(z)),
        ):
            usage, measured = plan(planned, 8, 64, 64, dtype=torch.float32), measure(run)
            assert usage.flops == measured.flops
            assert usage.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
            peaks.append(usage.peak_bytes)
    assert peaks[2] < 0.5 * peaks[0] and peaks[3] < 0.5 * peaks[1]


def test_loads_exactly_its_file(tmp_path):
    """A file is loaded as it is, also through the registry; one of another architecture is refused with the counts."""
    path = tmp_path / "dc_ae.safetensors"
    torch.manual_seed(0)
    saved = DCAE(**VIDEO)
    save_file(saved.state_dict(), path)
    loaded = build({"type": "dc_ae", **VIDEO, "from_pretrained": str(path)}, MODELS)
    assert isinstance(loaded, Autoencoder) and not loaded.is_causal
    video = torch.rand(1, 3, 8, 8, 8)
    assert torch.equal(loaded.encode(video), saved.encode(video))
    with pytest.raises(ValueError, match=r"0 missing \[\], 0 unexpected \[\], 3 of another shape"):
        DCAE(**VIDEO, latent_channels=16, from_pretrained=str(path))


def test_random_weights_start_near_the_shortcuts():
    """Without a file, residual branches start near zero: norm scales are drawn as small as the weights."""
    torch.manual_seed(0)
    scale = DCAE(**VIDEO).encoder.stages[2].op_list[0].context_module.main.proj.norm.weight
    assert 0 < scale.std() < 0.04 and scale.abs().max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "dc-ae-f32t4c12"}, r"unknown; did you mean \['dc-ae-f32t4c128'"),
        ({"widths": (8, 8)}, "must have 2 entries, as widths has"),
        ({"blocks": ("ResBlock", "ResBlok", "EViTS5_GLU")}, r"unknown 'ResBlok'; did you mean \['ResBlock'\]"),
        ({"widths": (8, 16, 48)}, "48 at a level of 'EViTS5_GLU' is not a multiple of 32"),
        ({"encoder_depths": (0, 1, 1)}, "every level needs at least one block"),
        ({"temporal_levels": (True, True, True)}, "the last level has no next one"),
        ({"is_video": False}, "only is_video=True has time"),
        ({"downsample": "pixel_unshuffle"}, "only downsample='conv'"),
        ({"latent_channels": 5}, "must divide the last width 32"),
        ({"widths": (8, 64, 64)}, r"64 at level 1 must divide 4 \* 8 of level 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    """An architecture that cannot be built is refused by the name of the argument."""
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DCAE(**{**VIDEO, **arguments})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((18, 64, 64), r"num_frames=18 is not 4 \* k or 1; nearest allowed: 16 or 20"),
        ((3, 64, 64), r"num_frames=3 is not 4 \* k or 1; nearest allowed: 1 or 4"),
        ((8, 200, 64), r"height=200 is not 32 \* k; nearest allowed: 192 or 224"),
    ],
)
def test_sizes_that_cannot_be_coded(size, message):
    """A size that the strides do not divide is an error with the nearest allowed sizes."""
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DCAE().latent_shape(*size)
