"""FantasyTalking: recorded numbers of the published system, silence, layouts, cuts, and that it begins as Wan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_like.checkpoint.weights import load_pretrained, read_weights
from opensora_like.models.base import Denoiser
from opensora_like.models.fantasy_talking import FantasyTalking, convert
from opensora_like.models.fantasy_talking.blocks import AudioProjection, SpeechContext
from opensora_like.models.fantasy_talking.windows import heard_vectors, window_bounds, window_mask
from opensora_like.models.wan import Wan
from opensora_like.models.wan import convert as wan_convert
from opensora_like.models.wan.config import VARIANTS
from opensora_like.registry import MODELS, build

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "fantasy_a.json").read_text())
TENSORS = load_file(GOLDEN / "fantasy_a.safetensors")
SPLITS = [case for case in FACTS["split"] if "ranges" in case]
SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "num_layers": 2,
    "in_channels": 12,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "image_dim": 10,
    "text_length": 8,
}
AUDIO = {"audio_dim": 6, "audio_width": 14}


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in TENSORS.items() if name.startswith(prefix)}


def speaking(*, seed: int = 0, **changes) -> FantasyTalking:
    """A small model all of whose weights matter."""
    torch.manual_seed(seed)
    model = FantasyTalking(**{**SIZES, **AUDIO, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5))
    return model


def inputs(*, batch_size: int = 2, frames: int = 3, num_vectors: int = 19, seed: int = 1):
    """(x, t, conditions) of a model of `SIZES`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    conditions = {
        "text": draw(batch_size, 8, 20),
        "visual": draw(batch_size, 5, frames, 4, 6),
        "image_embeds": draw(batch_size, 5, 10),
        "audio": draw(batch_size, num_vectors, 6),
    }
    return draw(batch_size, 4, frames, 4, 6), torch.linspace(0.3, 0.9, batch_size), conditions


def test_recorded_projection():
    """`proj_model` under its published names."""
    model = AudioProjection(24, 20)
    model.load_state_dict(part("proj/weights/"))
    torch.testing.assert_close(model(TENSORS["proj/input"]), TENSORS["proj/output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: f"{case['audio_len']} of {case['num_frames']}")
def test_recorded_windows(case):
    """Ranges of every recorded length, and which vectors are in the windows, as narrow and as wide as published."""
    length, num_latents = torch.tensor([case["audio_len"]]), (case["num_frames"] - 1) // 4 + 1
    bounds = window_bounds(length, num_latents, margin=0)[0]
    assert [[begin, end - 1] for begin, end in bounds.tolist()] == case["ranges"]
    for recorded in case["windows"]:
        bounds = window_bounds(length, num_latents, margin=recorded["expand"])[0]
        begins, ends = bounds.clamp(0, case["audio_len"]).unbind(1)
        assert (ends - begins).tolist() == recorded["k_lens"]
        numbers = [list(range(b + 1, e + 1)) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
        assert sum(map(sum, numbers)) == recorded["sum"]
        for place, name in ((0, "first"), (-1, "last")):
            assert numbers[place] == [n for n in recorded[name] if n]


def test_recorded_windows_of_vectors():
    """What the mask lets through is what the published code gathers; its filling is let through nowhere."""
    projected = TENSORS["proj/output"]
    mask_TL = window_mask(torch.tensor([projected.shape[1]]), len(TENSORS["windows/k_lens"]), projected.shape[1])[0]
    assert mask_TL.sum(1).tolist() == TENSORS["windows/k_lens"].tolist()
    for row, window in zip(mask_TL, TENSORS["windows/audio_proj"][0], strict=True):
        torch.testing.assert_close(projected[0][row], window[: int(row.sum())], atol=1e-5, rtol=0)


def test_windows_of_81_frames():
    """The table of 173 vectors, 3.5 s at 23 frames per second; one latent frame alone and no audio are no error."""
    bounds = window_bounds(torch.tensor([173, 160]), 21)
    assert (bounds[0, :3] - torch.tensor([-4, 5])).tolist() == [[-7, 1], [1, 9], [9, 17]]
    assert (bounds[:, :, 1] - bounds[:, :, 0]).unique(dim=1).tolist() == [[17], [15]]
    assert window_mask(torch.tensor([5]), 1, 5).any() and not window_mask(torch.tensor([0]), 3, 5).any()


def recorded_attention() -> torch.nn.Module:
    """The published cross-attention in a block of ours."""
    weights = part("attn/weights/")
    dim, width = weights["processor.k_proj.weight"].shape
    sizes = SIZES | {"num_attention_heads": 2, "attention_head_dim": dim // 2, "num_layers": 1}
    model = FantasyTalking(**sizes, audio_dim=24, audio_width=width)
    own = convert.to_diffusers({f"blocks.0.cross_attn.{name}": weight for name, weight in weights.items()})
    if not any(".attn2.to_q" in name for name in own):  # nothing of self-attention tells the layout
        own = {wan_convert.to_diffusers_name(n) if not convert.is_added(n) else n: w for n, w in own.items()}
    attn = model.blocks[0].attn2
    attn.load_state_dict({name.removeprefix("blocks.0.attn2."): weight for name, weight in own.items()})
    return attn


def attend(attn: torch.nn.Module, audio_BKC: Tensor, heard_BLK: Tensor, *, scale: float, text: int | None) -> Tensor:
    image_BLD, text_BLD = TENSORS["attn/context"].split([257, 7], dim=1)
    context = SpeechContext(text_BLD[:, :text], image_BLD, audio_BKC, heard_BLK, scale)
    return attn(TENSORS["attn/x"], context, None, None)


MASKED = [case for case in FACTS["attn"] if case["k_lens_masked"]]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case["key"].split("/")[-1])
def test_recorded_attention(case):
    """Text, image and audio at every scale and length of text; recorded numbers that attend to filling are wrong."""
    audio = TENSORS["proj/output"]
    heard = window_mask(torch.tensor([43]), 6, 43).repeat_interleave(6, dim=1)
    scale, lengths = case["audio_scale"], case["context_lens"]
    out = attend(recorded_attention(), audio, heard, scale=scale, text=lengths[0] if lengths else None)
    torch.testing.assert_close(out, TENSORS[case["key"]], atol=1e-5, rtol=0)


def test_recorded_attention_to_all_vectors():
    """Where every token hears everything, as the published code does with audio that is not cut into windows."""
    audio = TENSORS["attn/audio3"]
    everything = torch.ones(1, 36, audio.shape[1], dtype=torch.bool)
    out = attend(recorded_attention(), audio, everything, scale=1.0, text=None)
    torch.testing.assert_close(out, TENSORS["attn/out/audio_rank3"], atol=1e-5, rtol=0)


def test_recorded_gradients():
    """Of keys and values of the audio."""
    attn = recorded_attention()
    heard = window_mask(torch.tensor([43]), 6, 43).repeat_interleave(6, dim=1)
    attend(attn, TENSORS["proj/output"], heard, scale=1.0, text=None).square().mean().backward()
    for name in ("k_proj", "v_proj"):
        found = getattr(attn.processor, name).weight.grad
        torch.testing.assert_close(found, TENSORS[f"attn/grads/processor.{name}.weight"], atol=1e-5, rtol=1e-4)


def test_it_begins_as_wan():
    """With Wan's weights and its own initial ones, outputs are Wan's to the last bit, with any audio."""
    torch.manual_seed(0)
    wan = Wan(**SIZES)
    model = FantasyTalking(**SIZES, **AUDIO)
    missing = model.load_state_dict(wan.state_dict(), strict=False).missing_keys
    assert missing and all(convert.is_added(name) for name in missing)
    x, t, conditions = inputs()
    without = {name: c for name, c in conditions.items() if name != "audio"}
    assert torch.equal(model(x, t, conditions), wan(x, t, without))
    assert isinstance(model, Denoiser) and model.condition_names == wan.condition_names | {"audio"}


def test_without_audio_nothing_is_added():
    """Zeros are no audio: the output is that of Wan; so is a scale of 0; audio changes it."""
    model, (x, t, conditions) = speaking(), inputs()
    wan = Wan(**SIZES)
    wan.load_state_dict({n: w for n, w in model.state_dict().items() if not convert.is_added(n)})
    plain = wan(x, t, {name: c for name, c in conditions.items() if name != "audio"})
    silent = {**conditions, "audio": torch.zeros_like(conditions["audio"])}
    assert torch.equal(model(x, t, silent), plain)
    assert torch.equal(model(x, t, {**conditions, "audio": torch.zeros(2, 0, 6)}), plain)
    assert not torch.allclose(model(x, t, conditions), plain, atol=1e-3)
    model.audio_scale = 0.0
    torch.testing.assert_close(model(x, t, conditions), plain)


def test_a_batch_is_its_samples():
    """Clips with audio of different lengths, filled up with zeros, are what each is alone."""
    model, (x, t, conditions) = speaking(), inputs(batch_size=3)
    lengths = [19, 11, 0]
    for row, length in zip(conditions["audio"], lengths, strict=True):
        row[length:] = 0
    assert heard_vectors(conditions["audio"]).tolist() == lengths
    together = model(x, t, conditions)
    for i, length in enumerate(lengths):
        alone = {name: c[i : i + 1] for name, c in conditions.items()}
        alone["audio"] = alone["audio"][:, :length]
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], alone), together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_a_frame_hears_its_own_time():
    """Of a model of one block and no self-attention, a change of late vectors leaves early frames as they are."""
    model, (x, t, conditions) = speaking(num_layers=1), inputs(batch_size=1, frames=5, num_vectors=60)
    model.blocks[0].attn1.to_out[0].weight.data.zero_()
    before = model(x, t, conditions)
    changed = {**conditions, "audio": conditions["audio"].clone()}
    changed["audio"][:, 40:] += 1.0
    moved = (model(x, t, changed) - before).abs().amax(dim=(0, 1, 3, 4))
    bounds = window_bounds(torch.tensor([60]), 5)[0]
    assert (moved > 0).tolist() == (bounds[:, 1] > 40).tolist() and not moved[0] and moved[-1]


def test_gradients_reach_what_is_added():
    """From the start values' gradients, and from all when they matter; also through recomputed blocks."""
    model, (x, t, conditions) = speaking(), inputs()
    names = [name for name, _ in model.named_parameters() if convert.is_added(name)]
    assert sorted({n.split(".")[-2] for n in names}) == ["k_proj", "norm", "proj", "v_proj"]
    model(x, t, conditions).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(plain[name].abs().sum() > 0 for name in names)
    model.zero_grad()
    model.set_grad_checkpoint(True)
    model(x, t, conditions).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def published_files(model: FantasyTalking, folder: Path) -> tuple[Path, Path]:
    """Wan's weights in their original layout, and the published table of what is added."""
    own = model.state_dict()
    original = convert.to_original(own)
    save_file({n: w.contiguous() for n, w in original.items() if not convert.is_added(n)}, folder / "wan.safetensors")
    added = {n: w for n, w in original.items() if convert.is_added(n)}
    table = {
        "proj_model": {n.removeprefix("proj_model."): w for n, w in added.items() if n.startswith("proj_model.")},
        "audio_processor": {n: w for n, w in added.items() if ".processor." in n},
    }
    assert set(table["proj_model"]) == {"proj.weight", "norm.weight", "norm.bias"}
    assert {n.split(".", 2)[2] for n in table["audio_processor"]} == {
        "cross_attn.processor.k_proj.weight",
        "cross_attn.processor.v_proj.weight",
    }
    torch.save(table, folder / "added.ckpt")
    return folder / "wan.safetensors", folder / "added.ckpt"


def test_published_files_are_read(tmp_path):
    """Wan's file with the table beside it, the same as one flat file; neither is enough where all has to be there."""
    model, (x, t, conditions) = speaking(), inputs()
    base, added = published_files(model, tmp_path)
    read = FantasyTalking(**SIZES, **AUDIO, from_pretrained=str(base), audio_pretrained=str(added))
    report = load_pretrained(read, str(base), where="model.from_pretrained", strict=True)
    assert report.fits and any("audio_pretrained" in line for line in report.adapted)
    assert torch.equal(read(x, t, conditions), model(x, t, conditions))
    flat = tmp_path / "flat.safetensors"
    save_file({n: w.contiguous() for n, w in convert.to_original(model.state_dict()).items()}, flat)
    again = FantasyTalking(**SIZES, **AUDIO)
    assert load_pretrained(again, str(flat), where="model.from_pretrained", strict=True).fits
    assert torch.equal(again(x, t, conditions), model(x, t, conditions))
    with pytest.raises(ValueError, match="7 missing"):
        load_pretrained(FantasyTalking(**SIZES, **AUDIO), str(base), where="model.from_pretrained", strict=True)
    with pytest.raises(ValueError, match="unknown table 'optimizer'"):
        convert.to_diffusers({"optimizer": {}})
    assert set(read_weights(added)) == {"proj_model", "audio_processor"}


def test_weights_that_were_trained_further_are_not_replaced(tmp_path):
    """A fine-tuned file has the added weights itself: with others beside it nobody knows which are meant."""
    model = speaking()
    _, added = published_files(model, tmp_path)
    both, tuned = FantasyTalking(**SIZES, **AUDIO, audio_pretrained=str(added)), tmp_path / "tuned.safetensors"
    save_file(model.state_dict(), tuned)
    assert load_pretrained(both, str(tuned), where="model.from_pretrained", strict=True).fits  # they are the same
    model.proj_model.norm.weight.data.add_(1)
    save_file(model.state_dict(), tuned)
    with pytest.raises(ValueError, match=r"has 1 of the tensors of model.audio_pretrained=.*norm.weight.* to None"):
        load_pretrained(both, str(tuned), where="model.from_pretrained", strict=True)


def test_layouts_convert_both_ways():
    """To the original layout and back nothing is lost, of the whole and of what is added alone."""
    own = speaking().state_dict()
    original = convert.to_original(own)
    assert "blocks.1.cross_attn.processor.k_proj.weight" in original and "blocks.1.cross_attn.q.weight" in original
    again = convert.to_diffusers(original)
    assert again.keys() == own.keys() and all(again[name] is original_of(original, name) for name in own)
    added = {name: weight for name, weight in own.items() if convert.is_added(name)}
    assert convert.to_diffusers(convert.to_original(added)).keys() == added.keys()


def original_of(original: dict[str, Tensor], name: str) -> Tensor:
    """The tensor that stands under the original name of ours."""
    if convert.is_added(name):
        return original[name.replace(".attn2.", ".cross_attn.")]
    return original[wan_convert.to_original_name(name)]


def test_sizes_of_the_published_model():
    """40 blocks with keys and values of 2048 x 5120, and the projection: 840 million weights more than Wan's."""
    with torch.device("meta"):
        model = build({"type": "fantasy_talking", "variant": "i2v-14B"}, MODELS, where="model")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if convert.is_added(name)}
    assert shapes["blocks.39.attn2.processor.k_proj.weight"] == (5120, 2048)
    assert shapes["proj_model.proj.weight"] == (2048, 768)
    assert len(shapes) == 2 * VARIANTS["i2v-14B"]["num_layers"] + 3
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 40 * 2 * 2048 * 5120 + 2048 * 768 + 2 * 2048


def test_mistakes_are_named():
    """Audio that is missing, or of another width."""
    model, (x, t, conditions) = speaking(), inputs()
    with pytest.raises(ValueError, match="missing \\['audio'\\]"):
        model(x, t, {n: c for n, c in conditions.items() if n != "audio"})
    with pytest.raises(ValueError, match=r"\[2, K, 6\] is needed"):
        model(x, t, {**conditions, "audio": torch.zeros(2, 5, 7)})
    with pytest.raises(ValueError, match="audio_width=0"):
        FantasyTalking(**SIZES, audio_width=0)
