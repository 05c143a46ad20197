"""Adapters in the files of other programs: names, shapes and merged weights recorded from a published trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_like.checkpoint.adapters import begin_from, merge_adapters
from opensora_like.checkpoint.lora_files import module_table, parse_adapters, to_kohya
from opensora_like.models.lora import adapters_of, add_lora, file_name
from opensora_like.models.wan import Wan
from opensora_like.models.wan.convert import to_diffusers_name

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "lora_a.json").read_text())
RECORDED = load_file(GOLDEN / "lora_a.safetensors")
# the published target names, of the original layout -> ends of our names
TARGETS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
CONFIG = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "ffn.net.2"]}


def wan(seed: int = 0) -> Wan:
    """The model that the numbers were recorded with, with random weights."""
    sizes = FACTS["wan"]
    torch.manual_seed(seed)
    model = Wan(
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
        in_channels=sizes["in_dim"],
        out_channels=sizes["out_dim"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        text_length=4,
    )
    torch.nn.init.normal_(model.proj_out.weight)
    return model


def forward(model: Wan) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 2, 4, 4, generator=draw), torch.randn(2, 3, 12, generator=draw)
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.9]), {"text": text})


def trained(config: dict = CONFIG) -> Wan:
    """With adapters that do something."""
    model = wan()
    add_lora(model, config, seed=0)
    for parameter in adapters_of(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def weights_of(model: Wan) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in adapters_of(model).items()}


def write_peft(model: Wan, config: dict, folder: Path) -> Path:
    folder.mkdir()
    save_file({file_name(n): w.clone() for n, w in weights_of(model).items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", FACTS["peft"], ids=lambda case: case["target"])
def test_names_and_shapes_are_the_published_ones(case: dict) -> None:
    """The ends of names choose the recorded linears, not parts of them; kohya names are those, each with its alpha."""
    targets = [TARGETS[name] for name in case["target"].split(",")]
    config = {"r": case["rank"], "lora_alpha": case["alpha"], "target_modules": targets}
    with torch.device("meta"):
        model = wan()
    found = to_kohya(weights_of(trained(config)), config, model)
    alphas = {name: tensor for name, tensor in found.items() if name.endswith(".alpha")}
    assert {n: list(t.shape) for n, t in found.items() if n not in alphas} == case["kohya"]
    assert len(alphas) == len(case["kohya"]) / 2 and all(t.item() == case["alpha"] for t in alphas.values())


@pytest.mark.parametrize("case", [*FACTS["cases"], *FACTS["peft"]], ids=lambda case: case.get("name") or case["target"])
def test_every_recorded_key_finds_its_linear(case: dict) -> None:
    """Of the trainer's own files, and of its peft files with original names, under any usual prefix."""
    model = wan()
    weights = {name: torch.ones(shape) for name, shape in case["saved"].items()}
    found = parse_adapters(weights, model, where="file")
    num = sum(name.endswith(("lora_down.weight", "lora_A.weight")) for name in weights)
    assert len(found) == num > 0
    for module, adapter in found.items():
        assert adapter.delta().shape == model.get_submodule(module).weight.shape
    for prefix in ("base_model.model.", "diffusion_model.", "transformer."):
        if any(".lora_A." in name for name in weights):
            assert (
                parse_adapters({prefix + n: w for n, w in weights.items()}, model, where="file").keys() == found.keys()
            )


def test_every_linear_has_its_original_name() -> None:
    """The table is made from the model, and knows each recorded linear in both layouts and spellings."""
    table = module_table(wan())
    for name in FACTS["wan_linear_names"]:
        own = to_diffusers_name(name)
        assert table[name] == table[name.replace(".", "_")] == table[own] == own


def test_merged_weights_are_the_recorded_ones(tmp_path: Path) -> None:
    """W + strength * alpha / rank * up @ down, alpha other than the rank; without alpha the scale is 1."""
    model, strength = wan(), FACTS["merge"]["multiplier"]
    own = {name: to_diffusers_name(name) for name in FACTS["merge"]["modules"]}
    for name, module in own.items():
        model.get_submodule(module).weight.data.copy_(RECORDED[f"merge/{name}/before"])
    files: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for key, tensor in RECORDED.items():
        if key.startswith("merge/lora/"):
            name = key.removeprefix("merge/lora/")
            files[name.startswith("lora_unet")][name] = tensor
    for is_kohya, stage in ((True, "after"), (False, "after_then_peft_form")):
        save_file(files[is_kohya], tmp_path / "lora.safetensors")
        source = str(tmp_path / "lora.safetensors")
        assert merge_adapters(model, source, where="lora", use_ema=True, strength=strength) == len(files[is_kohya])
        for name, module in own.items():
            if (key := f"merge/{name}/{stage}") in RECORDED:
                torch.testing.assert_close(model.get_submodule(module).weight.data, RECORDED[key], atol=1e-6, rtol=1e-6)


def test_an_adapted_linear_is_the_recorded_one() -> None:
    """Outputs and gradients of one linear; the recorded multiplier of 0.7 is a part of alpha here, whose rank is 4."""
    tensors = {name.removeprefix("linear/"): t for name, t in RECORDED.items() if name.startswith("linear/")}
    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    model[0].load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    add_lora(model, {"r": 4, "lora_alpha": 2 * 0.7, "target_modules": ["0"]}, seed=0)
    down, up = adapters_of(model).values()
    torch.testing.assert_close(model(tensors["x"]), tensors["plain"], atol=1e-6, rtol=0)
    down.data.copy_(tensors["down"])
    up.data.copy_(tensors["up"])
    out = model(tensors["x"])
    torch.testing.assert_close(out, tensors["lora_out"], atol=1e-6, rtol=0)
    out.square().mean().backward()
    torch.testing.assert_close(down.grad, tensors["grad_down"], atol=1e-6, rtol=0)
    torch.testing.assert_close(up.grad, tensors["grad_up"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("form", ["peft", "file of peft", "kohya"])
def test_merged_equals_the_trained_forward(form: str, use_rslora: bool, tmp_path: Path) -> None:
    """Written, read and merged into the plain model; and read into one that goes on training. alpha is not the rank.

    Of peft's folder the file may be named as well: its settings lie beside it.
    """
    config = CONFIG | {"use_rslora": use_rslora}
    model = trained(config)
    expected = forward(model)
    assert (expected - forward(wan())).abs().max() > 1e-2
    if form != "kohya":
        folder = write_peft(model, config, tmp_path / "peft")
        source = str(folder if form == "peft" else folder / "adapter_model.safetensors")
    else:
        source = str(tmp_path / "lora.safetensors")
        save_file({n: t.contiguous() for n, t in to_kohya(weights_of(model), config, wan()).items()}, source)
    plain = wan()
    merge_adapters(plain, source, where="lora", use_ema=True)
    torch.testing.assert_close(forward(plain), expected, atol=1e-5, rtol=1e-5)
    again = wan()
    add_lora(again, config, seed=1)
    begin_from(again, source, config, where="lora")
    torch.testing.assert_close(forward(again), expected, atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Another scale, a key of no linear, half an adapter, other shapes, settings that are not read."""
    model = trained()
    source = str(tmp_path / "lora.safetensors")
    whole = {n: t.contiguous() for n, t in to_kohya(weights_of(model), CONFIG, wan()).items()}
    save_file(whole, source)
    other = CONFIG | {"lora_alpha": 4}
    again = wan()
    add_lora(again, other, seed=0)
    with pytest.raises(
        ValueError, match=r"another scale .* than the 1 of lora_config: .*0.5.*set lora_config.lora_alpha"
    ):
        begin_from(again, source, other, where="lora")
    up = next(name for name in whole if name.endswith("lora_up.weight"))
    for change, message in (
        ({"lora_te_text_model_q.lora_up.weight": torch.ones(2, 2)}, r"1 of \d+ tensors are of no linear of Wan"),
        ({up: None}, r"has \['alpha', 'down'\] only"),
        ({up: torch.ones(5, 4)}, r"has shapes \(5, 4\)"),
    ):
        changed = {n: t for n, t in (whole | change).items() if t is not None}
        with pytest.raises(ValueError, match=message):
            parse_adapters(changed, wan(), where="file")
    with pytest.raises(ValueError, match=r"alpha_pattern=.* is not supported"):
        merge_adapters(
            copy.deepcopy(wan()),
            str(write_peft(model, CONFIG | {"alpha_pattern": {"x": 1}}, tmp_path / "peft")),
            where="lora",
            use_ema=True,
        )
