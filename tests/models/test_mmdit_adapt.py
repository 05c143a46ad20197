"""Published weights in a model of other options: the same outputs, and a line for everything that was changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.models.mmdit import MMDiT

SIZES = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": (4, 6, 6),
}
FLUX = {"fused_qkv": True, "use_liger_rope": False}
OPEN_SORA = {"fused_qkv": False, "use_liger_rope": True}


def model_of(seed: int, **options: bool) -> MMDiT:
    """A small model; none of its weights is zero."""
    torch.manual_seed(seed)
    model = MMDiT(**SIZES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def output(model: MMDiT, *, visual: bool = False) -> torch.Tensor:
    """Of fixed inputs; `visual` gives frames, without it a model that takes them is given none."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, conditions = draw(2, 4, 3, 4, 6), {"text": draw(2, 5, 20), "pooled": draw(2, 12)}
    frames = draw(2, 5, 3, 4, 6)
    if model.cond_embed:
        conditions["visual"] = frames if visual else torch.zeros_like(frames)
    if model.guidance_embed:
        conditions["guidance"] = torch.full((2,), 4.0)
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.9]), conditions)


def load(source: MMDiT, folder: Path, *, strict: bool = False, **options: bool):
    """The weights of `source`, from a file, in a model with `options`; and the report."""
    file = folder / "weights.safetensors"
    save_file(source.state_dict(), file)
    torch.manual_seed(9)
    model = MMDiT(**SIZES, **options)
    return model, load_pretrained(model, str(file), where="model.from_pretrained", strict=strict)


@pytest.mark.parametrize(("source", "target"), [(FLUX, OPEN_SORA), (OPEN_SORA, FLUX)], ids=["to_split", "to_fused"])
def test_layouts_convert_on_the_way(source: dict, target: dict, tmp_path: Path) -> None:
    """FLUX's layout into Open-Sora's and back: every key fits, outputs stay, both changes are told."""
    original = model_of(0, **source)
    model, report = load(original, tmp_path, strict=True, **target)
    torch.testing.assert_close(output(model), output(original), atol=1e-5, rtol=0)
    assert len(report.adapted) == 2 and "rows of queries and keys taken to be in" in report.adapted[1]
    assert all(line.startswith("adapted: ") for line in report.lines())


@pytest.mark.parametrize("layout", [FLUX, OPEN_SORA, {"fused_qkv": True, "use_liger_rope": True}])
def test_weights_that_fit_are_not_touched(layout: dict, tmp_path: Path) -> None:
    """Same options: bit for bit, and nothing to report."""
    original = model_of(0, **layout, cond_embed=True)
    model, report = load(original, tmp_path, strict=True, **layout, cond_embed=True)
    assert all(torch.equal(w, original.state_dict()[n]) for n, w in model.state_dict().items())
    assert report.fits and not report.adapted and not report.lines()


def test_flux_becomes_the_start_of_a_model_with_given_frames(tmp_path: Path) -> None:
    """guidance_in is left out and told; cond_in is missing, told and zero, so given frames change nothing yet."""
    flux = model_of(0, **FLUX, guidance_embed=True)
    model, report = load(flux, tmp_path, **OPEN_SORA, cond_embed=True)
    assert report.missing == ["cond_in.bias", "cond_in.weight"] and not report.unexpected
    assert any("guidance_in: 4 tensors left out" in line for line in report.adapted)
    torch.testing.assert_close(output(model, visual=True), output(model), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"does not fit the model: .*cond_in"):
        load(flux, tmp_path, strict=True, **OPEN_SORA, cond_embed=True)


def test_a_model_with_given_frames_becomes_one_without(tmp_path: Path) -> None:
    """Open-Sora v2 into a text-to-video model: the outputs that it has when no frame is given."""
    original = model_of(0, **OPEN_SORA, cond_embed=True)
    model, report = load(original, tmp_path, strict=True, **OPEN_SORA)
    torch.testing.assert_close(output(model), output(original), atol=1e-5, rtol=0)
    assert report.adapted == ("cond_in left out, since model.cond_embed is False; its bias added to img_in.bias",)


def test_names_with_a_prefix(tmp_path: Path) -> None:
    """What other programs put in front of all names is taken off, and told."""
    original = model_of(0, **FLUX)
    prefixed = {f"model.diffusion_model.{n}": w for n, w in original.state_dict().items()}
    own, notes = original.adapt_weights(prefixed)
    assert own.keys() == original.state_dict().keys() and "taken off" in notes[0]


def test_mixed_layouts_are_refused() -> None:
    """Some blocks fused, some split: no layout is guessed."""
    mixed = model_of(0, **FLUX).state_dict() | model_of(0, **OPEN_SORA).state_dict()
    with pytest.raises(ValueError, match="some blocks have fused"):
        model_of(1, **FLUX).adapt_weights(mixed)
