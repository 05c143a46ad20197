"""Wan 2.2: experts load from either layout, are trained within their part of the times; TI2V-5B keeps given tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_like import rng
from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.config import read_config
from opensora_like.models.wan import Wan, convert
from opensora_like.registry import SCHEDULERS, build
from tests.models.test_wan import TINY, inputs, tiny

CONFIGS = Path(__file__).parents[2] / "configs/diffusion/train"
BOUNDARY = json.loads((Path(__file__).parents[1] / "golden/wan_boundary_a.json").read_text())


def original_config(model: Wan, *, model_type: str) -> dict:
    sizes = model.sizes
    return {
        "_class_name": "WanModel",
        "model_type": model_type,
        "dim": sizes.dim,
        "num_heads": 4,
        "eps": 1e-6,
        "num_layers": sizes.num_layers,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_dim": sizes.in_channels,
        "out_dim": sizes.out_channels,
        "text_dim": sizes.text_dim,
    }


@pytest.mark.parametrize("image_dim", [None, 10])
def test_an_expert_loads_from_either_folder(image_dim: int | None, tmp_path: Path) -> None:
    """diffusers' transformer_2 and the original low_noise_model give one model; i2v of 2.1 alone is shown CLIP's."""
    model = tiny(in_channels=12, image_dim=image_dim)
    save_file(model.state_dict(), tmp_path / "transformer_2.safetensors")
    folder = tmp_path / "low_noise_model"
    folder.mkdir()
    save_file(convert.to_original(model.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    config = original_config(model, model_type="i2v") | ({} if image_dim is None else {"image_dim": image_dim})
    (folder / "config.json").write_text(json.dumps(config))
    x, t, conditions = inputs(model)
    for source in (tmp_path / "transformer_2.safetensors", folder):
        again = Wan(config=str(folder), text_length=8)
        assert again.sizes.image_dim == image_dim
        assert load_pretrained(again, str(source), where="model.from_pretrained", strict=True).fits
        assert torch.equal(again(x, t, conditions), model(x, t, conditions))


@pytest.mark.parametrize(("name", "image_dim"), [("high_noise_model", None), ("Wan2.1-I2V-14B-720P", 1280)])
def test_without_weights_the_folder_tells(name: str, image_dim: int | None, tmp_path: Path) -> None:
    """The original configs of both are the same."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(original_config(tiny(in_channels=12), model_type="i2v")))
    with torch.device("meta"):
        assert Wan(config=str(tmp_path / name)).sizes.image_dim == image_dim


@pytest.mark.parametrize("case", BOUNDARY, ids=lambda case: f"shift {case['shift']:g} at {case['boundary']:g}")
def test_shares_of_the_experts_are_the_published_ones(case: dict) -> None:
    """A uniform draw falls to the high-noise expert as often as the published table of 1000 times has it, within one
    of its steps; a run of one expert draws from its part alone, uniformly before the shift."""
    whole = build({"type": "flow_matching", "t_distribution": "uniform", "shift": case["shift"]}, SCHEDULERS)
    quantiles = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    t = whole.t_from_base(torch.zeros_like(quantiles), quantiles, (1, 1, 1))
    assert (t >= case["boundary"]).double().mean() * 1000 == pytest.approx(case["high"]["n"], abs=1)
    for window in ({"t_min": case["boundary"]}, {"t_max": case["boundary"]}):
        section = {"type": "flow_matching", "t_distribution": "uniform", "shift": case["shift"], "window": "truncate"}
        part = build({**section, **window}, SCHEDULERS)
        drawn = part.t_from_base(torch.zeros_like(quantiles), quantiles, (1, 1, 1))
        inside = t[(t >= window.get("t_min", 0)) & (t <= window.get("t_max", 1))]
        for q in (0.1, 0.5, 0.9):
            assert drawn.quantile(q).item() == pytest.approx(inside.quantile(q).item(), abs=1e-3)
        assert drawn.min() >= window.get("t_min", 0) and drawn.max() <= window.get("t_max", 1)


@pytest.mark.parametrize(("task", "boundary", "shift"), [("t2v", 0.875, 12.0), ("i2v", 0.9, 5.0)])
def test_shipped_configs_cover_all_times_once(task: str, boundary: float, shift: float) -> None:
    """High and low meet at the published boundary, with the published shift, and differ in weights and window alone."""
    high, low = (read_config(CONFIGS / f"wan2_2_{task}_a14b_{noise}.py").config for noise in ("high", "low"))
    assert (high.scheduler["t_min"], low.scheduler["t_max"]) == (boundary, boundary)
    assert high.scheduler["shift"] == low.scheduler["shift"] == shift
    assert Path(high.model["from_pretrained"]).name == "transformer"
    assert Path(low.model["from_pretrained"]).name == "transformer_2"
    generators = [rng.generator(0, "t", 0, row) for row in range(500)]
    for config, inside in ((high, lambda t: t >= boundary), (low, lambda t: t <= boundary)):
        drawn = build(config.scheduler, SCHEDULERS).draw_t(generators, (21, 60, 104))
        assert inside(drawn).all()
        assert ((drawn - boundary).abs() < 1e-4).float().mean() < 0.02, "no mass gathers at the boundary"


@pytest.mark.parametrize(
    ("variant", "number"), [("ti2v-5B", 4_999_787_712), ("t2v-A14B", 14_288_491_584), ("i2v-A14B", 14_288_901_184)]
)
def test_published_sizes(variant: str, number: int) -> None:
    """As many weights as the published models have; only the first convolution of i2v is wider."""
    with torch.device("meta"):
        model = Wan(variant, token_replace=variant == "ti2v-5B")
    assert sum(p.numel() for p in model.parameters()) == number
    assert model.condition_names == ({"text"} if variant == "t2v-A14B" else {"text", "visual"})


def given_first(model: Wan, *, given: bool = True) -> tuple[torch.Tensor, torch.Tensor, dict]:
    x, t, conditions = inputs(model)
    conditions["visual"][:, :1] = 0.0
    conditions["visual"][:, 0, 0] = float(given)
    return x, t, conditions


def published(model: Wan):
    from diffusers import WanTransformer3DModel

    names = ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "in_channels", "out_channels")
    theirs = WanTransformer3DModel(**{name: TINY[name] for name in names}, text_dim=20, freq_dim=16)
    theirs.load_state_dict(model.state_dict())
    return theirs


def test_given_tokens_are_clean_and_told_so() -> None:
    """As diffusers with a time per token: given latents stand in x, their tokens have t = 0; outputs and gradients."""
    model = tiny(token_replace=True)
    theirs = published(model)
    x, t, conditions = given_first(model)
    mixed = x.clone()
    mixed[:, :, 0] = conditions["visual"][:, 1:, 0]
    tokens_of_frame = x.shape[3] * x.shape[4] // 4
    times = (t[:, None] * 1000).repeat(1, x.shape[2] * tokens_of_frame)
    times[:, :tokens_of_frame] = 0
    expected = theirs(mixed, times, conditions["text"]).sample
    found = model(x, t, conditions)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-4, rtol=1e-3)


def test_what_stands_in_given_frames_is_not_seen() -> None:
    """Noise there changes nothing; a given latent does; without any it is text-to-video."""
    model = tiny(token_replace=True)
    x, t, conditions = given_first(model)
    out, noisy = model(x, t, conditions), x.clone()
    noisy[:, :, 0] = 7.0
    assert torch.equal(model(noisy, t, conditions), out)
    conditions["visual"][:, 1:, 0] += 1
    assert not torch.allclose(model(x, t, conditions), out)
    x, t, conditions = given_first(model, given=False)
    plain = tiny()
    torch.testing.assert_close(model(x, t, conditions), plain(x, t, {"text": conditions["text"]}), atol=1e-5, rtol=0)


def test_recomputation_and_refusals() -> None:
    """Checkpointed blocks give the same gradients; a model with channels for frames does not replace tokens."""
    grads = []
    for settings in (False, True):
        model = tiny(token_replace=True)
        model.set_grad_checkpoint(settings)
        model(*given_first(model)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(ValueError, match=r"token_replace=True is for models without channels .* 8"):
        tiny(token_replace=True, in_channels=12)
    with pytest.raises(ValueError, match="'visual' has shape"):
        model = tiny(token_replace=True)
        x, t, conditions = given_first(model)
        model(x, t, conditions | {"visual": conditions["visual"][:, 1:]})


def test_exported_config_is_that_of_diffusers(tmp_path: Path) -> None:
    """diffusers builds the same model of it, i2v with CLIP's tokens included."""
    from diffusers import WanTransformer3DModel

    for changes in ({}, {"in_channels": 12, "image_dim": 10}):
        model = tiny(**changes)
        (tmp_path / "config.json").write_text(json.dumps(model.diffusers_config()))
        theirs = WanTransformer3DModel.from_config(str(tmp_path))
        assert theirs.load_state_dict(model.state_dict())
        with torch.device("meta"):
            assert Wan(config=str(tmp_path)).sizes == model.sizes
