"""The patch autoencoder: exact both ways, causal in time, clear about sizes."""

import pytest
import torch

from opensora_like.models.autoencoders.patch import PatchAutoencoder
from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build


@pytest.mark.parametrize("stride, frames", [(1, 1), (1, 6), (2, 5), (4, 1), (4, 9)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_decoding_gives_back_every_bit(stride, frames, scale):
    """decode(encode(x)) is x bit for bit, and latents have the promised shape."""
    autoencoder = build({"type": "patch", "patch_size": 4, "temporal_stride": stride, "scale": scale}, MODELS)
    assert isinstance(autoencoder, Autoencoder) and isinstance(autoencoder, PatchAutoencoder)
    x = torch.randn(2, 3, frames, 8, 12, generator=torch.Generator().manual_seed(0))
    z = autoencoder.encode(x, torch.Generator())
    assert tuple(z.shape[1:]) == autoencoder.latent_shape(frames, 8, 12)
    assert z.shape == (2, autoencoder.latent_channels, (frames - 1) // stride + 1, 2, 3)
    assert torch.equal(autoencoder.decode(z), x)


def test_at_stride_one_encoding_inverts_too():
    """encode(decode(z)) is z bit for bit."""
    autoencoder = PatchAutoencoder(2, scale=2.0)
    z = torch.randn(1, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoencoder.encode(autoencoder.decode(z)), z)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_prefix_of_the_clip_is_a_prefix_of_the_latents(stride):
    """Latents see no later frame: the first frame alone gives the first latent frame of the clip."""
    autoencoder = PatchAutoencoder(2, stride)
    x = torch.randn(1, 3, 1 + 3 * stride, 4, 4, generator=torch.Generator().manual_seed(0))
    z = autoencoder.encode(x)
    for k in range(4):
        assert torch.equal(autoencoder.encode(x[:, :, : 1 + k * stride]), z[:, :, : k + 1])


def test_each_pixel_stays_in_its_place():
    """A latent pixel holds exactly the pixels of its block, ordered channel, frame, row, column."""
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(1, 2, 3, 4, 4)
    z = PatchAutoencoder(2, 2, channels=2).encode(x)
    assert torch.equal(z[0, :, 1, 1, 0], x[0, :, 1:3, 2:4, 0:2].flatten())


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: PatchAutoencoder(4, 4).latent_shape(8, 8, 8),
            "num_frames=8 is not .* nearest allowed: 5 or 9",
        ),
        (lambda: PatchAutoencoder(4).latent_shape(0, 8, 8), "num_frames=0 is not .* nearest allowed: 1"),
        (
            lambda: PatchAutoencoder(4).encode(torch.zeros(1, 3, 1, 8, 10)),
            "width=10 is not .* nearest allowed: 8 or 12",
        ),
        (lambda: PatchAutoencoder(4).encode(torch.zeros(1, 1, 1, 8, 8)), "1 channels, 3 are needed"),
        (lambda: PatchAutoencoder(4).decode(torch.zeros(1, 16, 1, 2, 2)), "16 channels, 48 are needed"),
        (lambda: PatchAutoencoder(0), "patch_size=0"),
        (lambda: PatchAutoencoder(4, scale=0.0), "scale=0.0"),
    ],
)
def test_sizes_that_do_not_fit_raise(call, message):
    """ValueError with both numbers."""
    with pytest.raises(ValueError, match=message):
        call()
