"""The HunyuanVideo denoiser: diffusers' numbers, padding, a given first frame, layouts of weights, the seam, cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_like.checkpoint.sharded import open_source, plan_load
from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.models.base import Denoiser
from opensora_like.models.hunyuan_video import HunyuanVideo, convert
from opensora_like.registry import MODELS, build
from opensora_like.training.compilation import compile_blocks

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "in_channels": 4,
    "rope_axes_dim": (4, 4, 4),
}
TINY = {**SIZES, "text_dim": 16, "pooled_dim": 8}
KINDS = pytest.mark.parametrize("token_replace", [False, True], ids=["t2v", "i2v"])
LENGTHS = [4, 6]  # of the captions, in 7 rows


def published(token_replace: bool = False, **changes):
    """diffusers' model with all weights drawn."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    kind = "token_replace" if token_replace else None
    names = {"text_embed_dim": 16, "pooled_projection_dim": 8, "image_condition_type": kind, "out_channels": 4}
    return HunyuanVideoTransformer3DModel(**SIZES, **names, **changes)


def tiny(token_replace: bool = False, **changes) -> HunyuanVideo:
    """Ours, with the same weights."""
    model = HunyuanVideo(**(TINY | {"token_replace": token_replace} | changes))
    model.load_state_dict(published(token_replace, **changes).state_dict())
    return model


def inputs(token_replace: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two samples with captions of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = draw(2, 7, 16)
    for row, length in zip(text, LENGTHS, strict=True):
        row[length:] = 0
    conditions = {"text": text, "pooled": draw(2, 8), "guidance": torch.tensor([6.0, 4.0])}
    if token_replace:
        conditions["visual"] = given(draw(2, 4, 1, 4, 6), num_frames=3)
    return draw(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8]), conditions


def given(latents: Tensor, *, num_frames: int) -> Tensor:
    """The visual condition of a first frame."""
    mask = torch.ones_like(latents[:, :1])
    return F.pad(torch.cat([mask, latents], dim=1), (0, 0, 0, 0, 0, num_frames - 1))


def run_published(model, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The call of diffusers' pipelines."""
    if "visual" in conditions:
        x = torch.cat([conditions["visual"][:, 1:, :1], x[:, :, 1:]], dim=2)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    guidance = conditions["guidance"] * 1000
    return model(x, t * 1000, conditions["text"], mask.long(), conditions["pooled"], guidance, return_dict=False)[0]


@KINDS
def test_outputs_and_gradients_are_those_of_diffusers(token_replace: bool) -> None:
    """For two captions of different lengths at different times: the velocity, and the gradient of every weight."""
    theirs, ours = published(token_replace), tiny(token_replace)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, t, conditions = inputs(token_replace)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = ours(x_ours, t, conditions), run_published(theirs, x_theirs, t, conditions)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-4)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-4, msg=name)


@KINDS
def test_padding_counts_for_nothing(token_replace: bool) -> None:
    """More or fewer zero rows, and the other captions of the batch, leave a sample as it is; other text does not."""
    model = tiny(token_replace)
    x, t, conditions = inputs(token_replace)
    out = model(x, t, conditions)
    longer = {**conditions, "text": F.pad(conditions["text"], (0, 0, 0, 5))}
    assert torch.equal(model(x, t, longer), out)
    for i, length in enumerate(LENGTHS):
        alone = {name: value[i : i + 1] for name, value in conditions.items()}
        alone["text"] = alone["text"][:, :length]
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], alone)[0], out[i], atol=1e-5, rtol=0)
    other = {**conditions, "text": conditions["text"] * 1.5}
    assert not torch.allclose(model(x, t, other), out)


def test_a_mask_is_used_only_where_captions_differ() -> None:
    """Of one length, after what is padding in all is cut off, captions need none, and the fast attention runs."""
    model = tiny()
    x, t, conditions = inputs()
    calls = []
    model.transformer_blocks[0].attn.attention.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    model(x, t, conditions)
    assert not calls
    model(x[:1], t[:1], {name: value[:1] for name, value in conditions.items()})
    assert len(calls) == 1 and calls[0].shape[2] == 3 * 2 * 3 + LENGTHS[0]


def first_frame_modulations(model: HunyuanVideo, t: float) -> tuple[Tensor, Tensor]:
    """What the tokens of the first frame, and those behind, are multiplied with in the first block."""
    x, _, conditions = inputs(True)
    seen = []
    model.transformer_blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x, torch.full((2,), t), conditions)
    _, gate, _, _, _, first_gate, *_ = seen[0]
    return first_gate, gate


def test_a_given_frame_is_modulated_as_at_time_zero() -> None:
    """Whatever t and guidance are; the other frames follow t. And what is noisy in its place is not looked at."""
    early, late = first_frame_modulations(tiny(True), 0.1), first_frame_modulations(tiny(True), 0.9)
    assert torch.equal(early[0], late[0]) and not torch.allclose(early[1], late[1])
    model = tiny(True)
    x, t, conditions = inputs(True)
    other = torch.cat([torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2)
    assert torch.equal(model(x, t, conditions), model(other, t, conditions))
    changed = {**conditions, "visual": conditions["visual"] * 1.5}
    assert not torch.allclose(model(x, t, changed), model(x, t, conditions))


def test_a_sample_without_a_given_frame_is_text_to_video() -> None:
    """Beside one with a frame it gets what the same weights give it in a model without frames; images run, too."""
    x, t, conditions = inputs(True)
    model, plain = tiny(True), tiny(False)
    conditions["visual"][1] = 0
    out = model(x, t, conditions)
    rest = {name: value for name, value in conditions.items() if name != "visual"}
    want = plain(x, t, rest)
    torch.testing.assert_close(out[1], want[1], atol=1e-5, rtol=0)
    assert not torch.allclose(out[0], want[0])
    image = {**conditions, "visual": torch.zeros(2, 5, 1, 4, 6)}
    torch.testing.assert_close(model(x[:, :, :1], t, image), plain(x[:, :, :1], t, rest), atol=1e-5, rtol=0)


def test_sampling_begins_with_a_trace_of_the_given_frame() -> None:
    """0.999 of noise and 0.001 of the frame, in all frames; noise alone where nothing is given."""
    x, _, conditions = inputs(True)
    conditions["visual"][1] = 0
    start = tiny(True).start_of(x, conditions)
    frame = conditions["visual"][:1, 1:, :1]
    torch.testing.assert_close(start[:1], 0.999 * x[:1] + 0.001 * frame, atol=1e-6, rtol=0)
    assert torch.equal(start[1], x[1]) and torch.equal(tiny().start_of(x, {}), x)


@KINDS
def test_weights_of_a_pipeline_are_found_and_loaded(token_replace: bool, tmp_path: Path) -> None:
    """From the folder of a pipeline whose ``transformer/`` is in several shards."""
    theirs = published(token_replace)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    model = HunyuanVideo(**TINY, token_replace=token_replace, from_pretrained=str(tmp_path))
    report = load_pretrained(model, model.from_pretrained, where="folder", strict=model.strict_load)
    assert report.fits and not report.adapted
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        unfilled = HunyuanVideo(**TINY, token_replace=token_replace)
    plan = plan_load(unfilled, open_source(tmp_path / "transformer", where="folder"))
    assert plan is not None and plan.report.fits, "each rank can read its own part"


def to_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of the original code, written out the other way round."""
    tops = {new: old for old, new in convert._TOP.items() if old not in ("final_layer.adaLN_modulation.1",)}
    linear = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
    out = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        holder, _, last = module.rpartition(".")
        if module == "norm_out.linear":
            out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat(value.chunk(2)[::-1])
        elif module in tops:
            out[f"{tops[module]}.{kind}"] = value
        elif holder in tops and last in linear:
            named = {"vector_in": {"linear_1": "in_layer", "linear_2": "out_layer"}, "txt_in.c_embedder": {}}
            last = named.get(tops[holder], linear).get(last, last)
            out[f"{tops[holder]}.{last}.{kind}"] = value
        elif module == "x_embedder.proj":
            out[f"img_in.proj.{kind}"] = value
    for old, (new, renamed, fused) in convert._BLOCKS.items():
        blocks = {int(name.removeprefix(f"{new}.").split(".")[0]) for name in weights if name.startswith(f"{new}.")}
        for i in blocks:
            pairs = [*((a, (b,)) for a, b in renamed.items()), *fused.items()]
            for target, parts in pairs:
                for kind in ("weight", "bias"):
                    found = [weights.get(f"{new}.{i}.{part}.{kind}") for part in parts]
                    if found[0] is not None:
                        out[f"{old}.{i}.{target}.{kind}"] = torch.cat(found)
    return out


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_original_layout_is_read(prefix: str, tmp_path: Path) -> None:
    """Fused projections are split, the output's shift and scale exchanged, and nothing is lost or renamed twice."""
    weights = {name: torch.randn_like(value) for name, value in tiny().state_dict().items()}
    original = {f"{prefix}{name}": value for name, value in to_original(weights).items()}
    assert convert.is_original(original) and not convert.is_original(weights)
    assert "txt_in.c_embedder.linear_1.weight" in {name.removeprefix(prefix) for name in original}
    model = tiny()
    adapted, changes = model.adapt_weights(original)
    assert adapted.keys() == weights.keys() and len(changes) == 1
    assert all(torch.equal(adapted[name], value) for name, value in weights.items())
    torch.save({"module": original}, tmp_path / "mp_rank_00_model_states.pt")  # as the original file has them
    assert load_pretrained(model, str(tmp_path / "mp_rank_00_model_states.pt"), where="file", strict=True).fits
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.adapt_weights(weights) == (weights, [])
    with pytest.raises(ValueError, match="do not fit"):
        convert.to_diffusers({"double_blocks.0.img_attn_qkv.weight": torch.zeros(30, 24)}, dim=24)


def test_the_original_layout_is_the_one_that_diffusers_reads() -> None:
    """diffusers' own converter, which knows the published width alone, names the same tensors of the same shapes."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    with torch.device("meta"):
        model = HunyuanVideo("t2v", num_layers=1, num_single_layers=1, num_refiner_layers=1)
    original = to_original(model.state_dict())
    theirs = convert_hunyuan_video_transformer_to_diffusers(dict(original))
    ours = convert.to_diffusers(original, dim=3072)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert ours.keys() == model.state_dict().keys()


def test_published_sizes() -> None:
    """Built on meta, both variants have 12.8 billion weights, no buffers, and the published conditions."""
    for variant, names in {"t2v": set(), "i2v": {"visual"}}.items():
        with torch.device("meta"):
            model = build({"type": "hunyuan_video", "variant": variant}, MODELS)
        assert sum(p.numel() for p in model.parameters()) == 12_821_012_544
        assert model.condition_names == {"text", "pooled", "guidance"} | names
        assert model.latent_channels == 16 and model.patch_size == 2 and not list(model.buffers())
        assert isinstance(model, Denoiser)


@KINDS
def test_recomputation_changes_nothing(token_replace: bool) -> None:
    """Gradients are the same whatever is recomputed, and a block that is runs twice."""
    model = tiny(token_replace)
    calls, gradients = [], []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for settings, runs in ((False, 4), ((1, 0), 5), ([2, 1], 7), (True, 8)):
        model.set_grad_checkpoint(settings)
        model.zero_grad()
        calls.clear()
        model(*inputs(token_replace)).square().mean().backward()
        assert len(calls) == runs, settings
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    for wrong in (-1, 1, [1], (1, -1)):
        with pytest.raises(ValueError, match="grad_checkpoint="):
            model.set_grad_checkpoint(wrong)


@KINDS
def test_half_precision_stays_close_to_float32(token_replace: bool) -> None:
    """bfloat16 weights give a bfloat16 output near the float32 one; every weight gets a finite gradient."""
    model = tiny(token_replace)
    want = model(*inputs(token_replace))
    half = model.bfloat16()(*inputs(token_replace))
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert half.dtype == torch.bfloat16 and (half.float() - want).norm() <= 0.05 * want.norm()


def test_blocks_compile_as_they_are() -> None:
    """torch.compile's eager backend takes every block and gives the same output."""
    model = tiny(True)
    want = model(*inputs(True))
    assert compile_blocks(model, "eager") == 4
    torch.testing.assert_close(model(*inputs(True)), want, atol=1e-6, rtol=0)


def test_mistakes_are_named() -> None:
    """Conditions that are missing, unknown or of another shape, sizes that do not fit, frames that cannot be given."""
    model = tiny(True)
    x, t, conditions = inputs(True)
    for name in conditions:
        with pytest.raises(ValueError, match=f"missing \\['{name}'\\]"):
            model(x, t, {n: v for n, v in conditions.items() if n != name})
    with pytest.raises(ValueError, match=r"unknown \['image_embeds'\]"):
        model(x, t, {**conditions, "image_embeds": x})
    for name, value in (("text", torch.zeros(2, 7, 15)), ("pooled", torch.zeros(2, 7)), ("visual", x)):
        with pytest.raises(ValueError, match=f"{name}.*is needed"):
            model(x, t, {**conditions, name: value})
    with pytest.raises(ValueError, match="multiples of 2"):
        model(x[..., :3], t, conditions)
    with pytest.raises(ValueError, match="padding alone"):
        model(x, t, {**conditions, "text": torch.zeros(2, 7, 16)})
    with pytest.raises(ValueError, match="behind the first"):
        model(x, t, {**conditions, "visual": torch.ones(2, 5, 3, 4, 6)})
    with pytest.raises(ValueError, match="33 input channels"):
        HunyuanVideo("i2v-33ch")
    with pytest.raises(ValueError, match="hunyuan_video has no"):
        HunyuanVideo(num_layers=1)
    with pytest.raises(ValueError, match="add up to attention_head_dim=12"):
        HunyuanVideo(**(TINY | {"rope_axes_dim": (4, 4, 6)}))
