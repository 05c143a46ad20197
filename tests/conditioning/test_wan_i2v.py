"""Wan's image-to-video condition: a mask of pixel frames, and latents of a clip that is grey where none is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_like.conditioning import wan_i2v
from opensora_like.conditioning.encode import Encode
from opensora_like.conditioning.masks import Given
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.image_encoders import CLIPImageEncoder
from opensora_like.models.text_encoders import UMT5TextEncoder
from opensora_like.models.wan import Wan

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 1, "text_dim": 16}
FRAMES, SIDE = 9, 16


@pytest.fixture(scope="module")
def autoencoder() -> WanVAE:
    return WanVAE(tiny={})


def clips(number: int = 1, frames: int = FRAMES) -> Tensor:
    return torch.rand(number, 3, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_masks_count_pixel_frames(autoencoder: WanVAE) -> None:
    """Four channels per latent frame; the first frame counts for all four, a last one for itself alone."""
    given = [Given(0, 0), Given(1, 0), Given(0, 1), Given(1, 1), Given(5, 0)]
    visual, given_BT = wan_i2v.grey_condition(autoencoder, clips(len(given)), given)
    assert visual.shape == (5, 4 + 16, 3, SIDE // 8, SIDE // 8)
    masks = visual[:, :4, :, 0, 0].transpose(1, 2)  # [B, T, 4]
    assert torch.equal(visual[:, :4], visual[:, :4, :, :1, :1].expand_as(visual[:, :4]))
    one, zero, last = [1.0] * 4, [0.0] * 4, [0.0, 0.0, 0.0, 1.0]
    expected = [[zero] * 3, [one, zero, zero], [zero, zero, last], [one, zero, last], [one, one, zero]]
    assert masks.tolist() == expected
    assert given_BT.tolist() == [[all(frame) for frame in clip] for clip in expected]


def test_what_is_not_given_is_grey(autoencoder: WanVAE) -> None:
    """Latents are those of the clip with zeros in the other frames, whatever these show."""
    video = clips()
    visual, _ = wan_i2v.grey_condition(autoencoder, video, [Given(1, 1)])
    grey = torch.zeros_like(video)
    grey[:, :, 0], grey[:, :, -1] = video[:, :, 0], video[:, :, -1]
    torch.testing.assert_close(visual[:, 4:], autoencoder.encode(grey))
    other = torch.cat([video[:, :, :1], torch.rand_like(video[:, :, 1:-1]), video[:, :, -1:]], dim=2)
    assert torch.equal(wan_i2v.grey_condition(autoencoder, other, [Given(1, 1)])[0], visual)
    alone = autoencoder.encode(video[:, :, :1])
    torch.testing.assert_close(visual[:, 4:, :1], alone)  # no frame depends on a later one


def test_the_image_encoder_sees_the_first_given_frame() -> None:
    """The head's first frame, without a head the tail's first, and grey in text-to-video."""
    video = clips(4)
    images = wan_i2v.first_given(video, ["i2v_head", "i2v_tail", "i2v_loop", "t2v"])
    assert torch.equal(images[:3], torch.stack([video[0, :, 0], video[1, :, -1], video[2, :, 0]]))
    assert not images[3].any()
    assert wan_i2v.sampling_clip("i2v_tail", [video[0, :, -1:]], (FRAMES, SIDE, SIDE))[:, -1].any()
    with pytest.raises(ValueError, match="no reference"):
        wan_i2v.sampling_clip("i2v_loop", [video[0, :, :1]], (FRAMES, SIDE, SIDE))


def encode_of(model: Wan, autoencoder: WanVAE, **dropout: float) -> Encode:
    return Encode(
        model,
        autoencoder,
        {
            "text": UMT5TextEncoder(tiny={"hidden_size": 16, "num_layers": 1}, max_length=8, dtype="fp32"),
            "image_embeds": CLIPImageEncoder(tiny={}, dtype="fp32"),
        },
        seed=0,
        device=torch.device("cpu"),
        dropout_ratio=dropout,
        condition_config={"i2v_head": 1.0},
        guidance=1.0,
        sample_posterior=False,
    )


def batch_of(**tensors: Tensor) -> Batch:
    shape = BucketShape("16px", FRAMES, SIDE, SIDE)
    return Batch(0, 0, shape, rows=[0, 1], text=["a", "b"], paths=["a", "b"], **tensors)


@pytest.mark.parametrize("ungiven", ["grey", "zero"])
def test_a_training_batch_has_all_conditions(autoencoder: WanVAE, ungiven: str) -> None:
    """Wan takes what is made; with "zero" the mask of the house and the given frames alone come to it."""
    model = Wan(**SIZES, in_channels=36, image_dim=16, text_length=8, ungiven=ungiven)
    video = clips(2)
    inputs = encode_of(model, autoencoder)(batch_of(video_BCTHW=video))
    expected, given_BT = wan_i2v.grey_condition(autoencoder, video, [Given(1, 0)] * 2)
    visual = inputs.conditions["visual"]
    if ungiven == "grey":
        assert torch.equal(visual, expected) and torch.equal(inputs.given_BT, given_BT)
    else:
        assert visual.shape[1] == 17 and not visual[:, 1:, 1:].any()
        torch.testing.assert_close(visual[:, 1:, 0], expected[:, 4:, 0])
    assert inputs.conditions["image_embeds"].shape == (2, 5, 16)
    assert model(inputs.x0_BCTHW, torch.rand(2), inputs.conditions).shape == inputs.x0_BCTHW.shape


def test_mistakes_are_named(autoencoder: WanVAE) -> None:
    """Latents alone, a dropout for pictures, given frames for a model that takes none."""
    model = Wan(**SIZES, in_channels=36, image_dim=16, text_length=8)
    with pytest.raises(ValueError, match="a dataset that reads videos"):
        encode_of(model, autoencoder)(batch_of(latents_BCTHW=torch.zeros(2, 16, 3, 2, 2)))
    with pytest.raises(ValueError, match=r"dropout_ratio\.image_embeds"):
        encode_of(model, autoencoder, image_embeds=0.1)
    with pytest.raises(ValueError, match="ungiven='zero'"):
        Wan(**SIZES, ungiven="zero")
    with pytest.raises(ValueError, match="10 frames of a clip of 9"):
        wan_i2v.grey_condition(autoencoder, clips(), [Given(5, 5)])
    with pytest.raises(ValueError, match="exactly one"):
        CLIPImageEncoder()
    with pytest.raises(FileNotFoundError, match="image encoder"):
        CLIPImageEncoder("nowhere")
    with pytest.raises(ValueError, match=r"did you mean .*hidden_size"):
        CLIPImageEncoder(tiny={"hidden": 3})
