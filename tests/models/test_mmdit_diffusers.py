"""Weights of diffusers' FLUX transformer: the same numbers from both programs, and every tensor back in its place."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from opensora_like.models.mmdit import MMDiT
from opensora_like.models.mmdit.adapt import adapt
from opensora_like.models.mmdit.convert import split_qkv, to_interleaved_rope, to_liger_rope
from opensora_like.models.mmdit.diffusers_layout import from_diffusers, to_diffusers
from opensora_like.models.tokens import patchify, position_ids, unpatchify
from tests.stand_ins import WIDTH, build_flux


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    model = build_flux(num_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return model.eval()


def ours(**changes) -> MMDiT:
    sizes = {"in_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH, "hidden_size": 32, "num_heads": 2}
    more = {"depth": 2, "depth_single_blocks": 2, "axes_dim": (4, 6, 6), "guidance_embed": True}
    return MMDiT(**(sizes | more | changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"fused_qkv": False, "use_liger_rope": True}, {"fused_qkv": False}])
@torch.no_grad()
def test_an_image_gets_the_same_velocity(flux, changes):
    """One frame through both programs with the same weights, whatever layout the model was built with."""
    weights, notes = adapt(flux.state_dict(), model := ours(**changes))
    model.load_state_dict(weights)
    assert any("diffusers" in note for note in notes)
    x, text, pooled = torch.randn(2, 4, 1, 4, 6), torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    t, guidance = torch.tensor([0.3, 0.9]), torch.tensor([4.0, 1.0])
    theirs = flux(
        patchify(x, 2),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=position_ids(1, 2, 3, device=x.device),
        txt_ids=torch.zeros(5, 3),
    ).sample
    expected = unpatchify(theirs, 2, num_frames=1, height=4, width=6)
    found = model(x, t, {"text": text, "pooled": pooled, "guidance": guidance})
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_every_tensor_comes_back(flux):
    """diffusers -> here -> diffusers, from the joined and the split layout."""
    state = flux.state_dict()
    here = from_diffusers(state)
    ours().load_state_dict(here)
    back = (to_diffusers(here), to_diffusers(split_qkv(here)), to_diffusers(to_interleaved_rope(to_liger_rope(here))))
    for found in back:
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    assert to_diffusers(state).keys() == state.keys()
    assert from_diffusers(here).keys() == here.keys()


def test_what_flux_has_not_is_refused():
    """The visual condition of Open-Sora would be lost."""
    with pytest.raises(ValueError, match=r"'cond_in.weight' has no place in the other layout"):
        to_diffusers(ours(cond_embed=True).state_dict())
