"""The Wan denoiser: recorded numbers of the published system, layouts, the seam, cuts by the plan, precision."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from opensora_like.checkpoint.weights import load_weights, read_weights
from opensora_like.models.base import Denoiser
from opensora_like.models.layers import attention
from opensora_like.models.wan import Wan, convert
from opensora_like.registry import MODELS, build
from opensora_like.training.compilation import compile_blocks

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = ["wan_t2v_a", "wan_i2v_a"]
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "text_length": 8,
}
I2V = {"in_channels": 12, "image_dim": 10}


def tiny(seed: int = 0, **changes) -> Wan:
    """A small model all of whose weights matter."""
    torch.manual_seed(seed)
    model = Wan(**(TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5))
    return model


def inputs(model: Wan, *, batch_size: int = 2, frames: int = 3, height: int = 4, width: int = 6, num_text: int = 8):
    """(x, t, conditions) that fit `model`."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    conditions = {"text": draw(batch_size, num_text, model.sizes.text_dim)}
    if "visual" in model.condition_names:
        conditions["visual"] = draw(batch_size, 1 + model.latent_channels, frames, height, width)
    if "image_embeds" in model.condition_names:
        conditions["image_embeds"] = draw(batch_size, 5, model.sizes.image_dim)
    t = torch.linspace(0.3, 0.9, batch_size)
    return draw(batch_size, model.latent_channels, frames, height, width), t, conditions


def recorded(name: str, tmp_path: Path) -> tuple[Wan, dict, dict]:
    """The recorded model with its weights, read as a user's files are; tensors and facts."""
    tensors, facts = load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())
    case = facts["case"]
    (tmp_path / "config.json").write_text(json.dumps(case["cfg"]))
    original = {n.removeprefix("weights/"): w for n, w in tensors.items() if n.startswith("weights/")}
    save_file(original, tmp_path / "model.safetensors")
    model = Wan(config=str(tmp_path), image_dim=case.get("clip_dim"), text_length=case["cfg"]["text_len"])
    weights = model.adapt_weights(read_weights(tmp_path))[0]
    load_weights(model, weights, where="recorded", strict=model.strict_load)
    return model, tensors, facts


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_outputs_and_gradients(name, tmp_path):
    """Output, input gradient and the gradient of every weight are those of the original code on original files."""
    model, tensors, facts = recorded(name, tmp_path)
    x, num_samples = tensors["inputs/x"].requires_grad_(), len(tensors["inputs/t"])
    conditions = {"text": pad_sequence([tensors[f"inputs/context_{i}"] for i in range(num_samples)], batch_first=True)}
    if "inputs/y" in tensors:
        conditions |= {"visual": tensors["inputs/y"], "image_embeds": tensors["inputs/clip_fea"]}
    out = model(x, tensors["inputs/t"].float() / 1000, conditions)
    torch.testing.assert_close(out, tensors["output"], atol=2e-5, rtol=0)
    out.square().mean().backward()
    torch.testing.assert_close(x.grad, tensors["grads/inputs.x"], atol=1e-7, rtol=1e-4)
    parameters = {convert.to_original_name(n): p for n, p in model.named_parameters()}
    for key in ("blocks.0.modulation", "patch_embedding.weight"):
        torch.testing.assert_close(parameters[key].grad, tensors[f"grads/{key}"], atol=1e-7, rtol=1e-4)
    assert parameters.keys() == facts["grad_norms"].keys()
    for key, norm in facts["grad_norms"].items():
        # keys' biases nearly cancel in a softmax: what is left of 5e-6 is rounding in the last places
        assert parameters[key].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), key


@pytest.mark.parametrize("name", RECORDED)
def test_layouts_convert_both_ways(name, tmp_path):
    """Original to diffusers and back gives the same names and tensors; prefixes and an unused norm are taken off."""
    model, tensors, _ = recorded(name, tmp_path)
    original = {n.removeprefix("weights/"): w for n, w in tensors.items() if n.startswith("weights/")}
    own = convert.to_diffusers(original)
    assert own.keys() == model.state_dict().keys() and convert.is_original(original) and not convert.is_original(own)
    back = convert.to_original(own)
    assert list(back) == list(original) and all(back[n] is w for n, w in original.items())
    prefixed = {f"model.diffusion_model.{n}": w for n, w in original.items()}
    assert convert.to_diffusers(prefixed).keys() == own.keys()
    once_saved = own | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    assert convert.to_diffusers(once_saved).keys() == own.keys()
    with pytest.raises(ValueError, match="two layouts are mixed"):
        convert.to_diffusers(original | {"proj_out.weight": original["head.head.weight"]})


def test_a_config_with_every_setting_is_read(tmp_path):
    """VideoX-Fun saves all arguments of its model, those that it does not read as well; the order says nothing."""
    saved = {
        **json.loads((GOLDEN / "wan_i2v_a.json").read_text())["case"]["cfg"],
        "_class_name": "WanTransformer3DModel",
        "qk_norm": True,
        "window_size": [-1, -1],
        "add_ref_conv": False,
        "add_control_adapter": False,
        "in_channels": 16,
        "hidden_size": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    sizes = Wan(config=str(tmp_path)).sizes
    assert (sizes.in_channels, sizes.out_channels, sizes.dim, sizes.image_dim) == (12, 4, 24, 1280)


@pytest.mark.parametrize("i2v", [False, True])
def test_equals_diffusers_from_a_saved_folder(i2v, tmp_path):
    """A folder that diffusers saved, read with its config and weights, gives diffusers' own output."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY.items() if k != "text_length"} | (I2V if i2v else {})
    theirs = WanTransformer3DModel(**sizes, added_kv_proj_dim=48 if i2v else None)
    theirs.save_pretrained(tmp_path / "transformer")
    model = Wan(config=str(tmp_path), from_pretrained=str(tmp_path / "transformer"))
    load_weights(model, model.adapt_weights(read_weights(model.from_pretrained))[0], where="folder")
    assert model.state_dict().keys() == theirs.state_dict().keys() and model.text_length == 512
    x, t, conditions = inputs(model, num_text=512)  # the length that diffusers is bound to in i2v
    beside = [conditions["visual"][:, :1].expand(-1, 4, -1, -1, -1), conditions["visual"][:, 1:]] if i2v else []
    with torch.no_grad():
        want = theirs(torch.cat([x, *beside], 1), t * 1000, conditions["text"], conditions.get("image_embeds"))
        torch.testing.assert_close(model(x, t, conditions), want.sample, atol=1e-5, rtol=1e-5)


def test_published_sizes():
    """Built on meta, each variant has the parameters of the published model."""
    counts = {
        "t2v-1.3B": 1_418_996_800,
        "t2v-14B": 14_288_491_584,
        "i2v-14B": 16_394_878_784,
        "i2v-A14B": 14_288_901_184,
    }
    for variant, count in counts.items():
        with torch.device("meta"):
            model = build({"type": "wan", "variant": variant}, MODELS)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.latent_channels == 16 and model.patch_size == 2 and not list(model.buffers())
        assert model.condition_names == {
            "t2v": {"text"},
            "i2v-14B": {"text", "visual", "image_embeds"},
            "i2v-A14B": {"text", "visual"},
        }.get(variant, {"text"})
    x, t, conditions = inputs(model, frames=1)
    out = model(x.to("meta"), t.to("meta"), {name: c.to("meta") for name, c in conditions.items()})
    assert out.shape == (2, 16, 1, 4, 6) and isinstance(model, Denoiser)


def test_mask_of_the_house_becomes_wans():
    """One mask channel per latent frame says the same as Wan's four, all of one value."""
    model = tiny(**I2V)
    x, t, conditions = inputs(model)
    mask, latents = conditions["visual"].split([1, 4], dim=1)
    whole = {**conditions, "visual": torch.cat([mask, mask, mask, mask, latents], dim=1)}
    assert torch.equal(model(x, t, conditions), model(x, t, whole))
    # recorded: the first of nine frames is known (0), and is four ones in the first of three latent frames
    tensors = load_file(GOLDEN / "wan_latents_a.safetensors")
    assert tensors["mask_pack/0/mask"].flatten(2).amax(2).flatten().tolist() == [0] + [1] * 8
    house = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    given = model._visual(torch.cat([house, torch.zeros(1, 4, 3, 2, 2)], dim=1))
    assert torch.equal(given[:, :4], tensors["mask_pack/0/out"])
    other = {**conditions, "visual": torch.cat([1 - mask, latents], dim=1)}
    assert not torch.allclose(model(x, t, conditions), model(x, t, other))


def test_text_is_filled_to_the_length_that_was_trained():
    """Missing rows become zeros, which the attention sees; a model told not to fill gives another output."""
    model = tiny()
    x, t, conditions = inputs(model, num_text=5)
    filled = {"text": F.pad(conditions["text"], (0, 0, 0, 3))}
    assert torch.equal(model(x, t, conditions), model(x, t, filled))
    model.text_length = None
    assert not torch.allclose(model(x, t, conditions), model(x, t, filled))


@pytest.mark.parametrize("changes", [{}, I2V])
def test_recomputation_changes_nothing(changes):
    """Gradients are the same whatever is recomputed, and a block that is runs twice."""
    model = tiny(**changes)
    calls, gradients = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for settings, runs in ((False, 2), (1, 3), ([2], 4), (True, 4), (9, 4)):
        model.set_grad_checkpoint(settings)
        model.zero_grad()
        calls.clear()
        model(*inputs(model)).square().mean().backward()
        assert len(calls) == runs, settings
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    for wrong in (-1, [1, 1], "2"):
        with pytest.raises(ValueError, match="grad_checkpoint="):
            model.set_grad_checkpoint(wrong)


@pytest.mark.parametrize("changes", [{}, I2V])
def test_half_precision_stays_close_to_float32(changes):
    """bfloat16 weights, and float32 weights under autocast, give bfloat16 near the float32 output; gradients flow."""
    model = tiny(**changes)
    want = model(*inputs(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(*inputs(model))
    mixed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.bfloat16()(*inputs(model))
    half.float().square().mean().backward()
    for out in (mixed, half):
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).norm() <= 0.05 * want.norm()


def test_time_stays_float32_up_to_the_modulation():
    """In a bfloat16 model, and under autocast, two times that bfloat16 cannot tell apart have their own modulation."""
    model = tiny()
    times = torch.tensor([0.9961, 0.9975])
    assert times[0].bfloat16() == times[1].bfloat16()
    exact = tiny()._embed_time(times)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model._embed_time(times)[1], exact)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded_weights = model._embed_time(times)[1]
    modulation = model.bfloat16()._embed_time(times)[1]
    assert modulation.dtype == torch.float32 and torch.equal(modulation, rounded_weights)
    assert not torch.equal(modulation[0], modulation[1])


class Exchange:
    """Lets threads that stand for ranks see each other's tensors; the autograd graph runs through."""

    def __init__(self, num_ranks: int):
        self.barrier, self.slots = threading.Barrier(num_ranks, timeout=300), [None] * num_ranks

    def __call__(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = tensor
        self.barrier.wait()
        every = list(self.slots)
        self.barrier.wait()
        return every

    def run(self, ranks: list[Wan], args) -> list[torch.Tensor]:
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(lambda rank: rank(*args), ranks))


class RowCut(nn.Module):
    """A rank's columns of a linear; the sum over ranks gets the bias once."""

    def __init__(self, linear: nn.Linear, rank: int, exchange: Exchange):
        super().__init__()
        self.rank, self.exchange, self.bias = rank, exchange, linear.bias
        self.weight = nn.Parameter(linear.weight.detach().chunk(2, dim=1)[rank])

    def forward(self, x):
        return sum(self.exchange(self.rank, F.linear(x, self.weight))) + self.bias


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, leaf = path.rsplit(".", 1)
    model.get_submodule(parent)._modules[leaf] = module


def tensor_parallel(model: Wan, rank: int, exchange: Exchange) -> Wan:
    """A copy of `model` cut by its plan for one of two ranks."""
    plan, part = model.parallel_plan(), copy.deepcopy(model)

    def paths(patterns):
        return [pattern.replace("*", str(i)) for pattern in patterns for i in range(len(model.blocks))]

    for path in paths(plan.column):
        linear = part.get_submodule(path)
        linear.weight = nn.Parameter(linear.weight.detach().chunk(2)[rank])
        linear.bias = nn.Parameter(linear.bias.detach().chunk(2)[rank])
    for path in paths(plan.row):
        replace(part, path, RowCut(part.get_submodule(path), rank, exchange))
    for path in paths(plan.head_counts):
        module, attribute = path.rsplit(".", 1)
        setattr(part.get_submodule(module), attribute, getattr(part.get_submodule(module), attribute) // 2)
    for path in paths(plan.split_norms):
        norm = part.get_submodule(path)
        norm.weight = nn.Parameter(norm.weight.detach().chunk(2)[rank])
        norm.mean_over_ranks = lambda mean: sum(exchange(rank, mean)) / 2
    return part


@pytest.mark.parametrize("changes", [{}, I2V])
def test_tensor_parallelism_by_the_plan_is_exact(changes):
    """Two ranks cut as the plan says give the output and the gradients of one, norms over all heads included."""
    model = tiny(**changes)
    args = inputs(model)
    want = model(*args)
    want.square().mean().backward()
    exchange = Exchange(2)
    ranks = [tensor_parallel(model, rank, exchange) for rank in range(2)]
    out = exchange.run(ranks, args)
    for part in out:
        torch.testing.assert_close(part, want, atol=2e-6, rtol=1e-5)
    out[0].square().mean().backward()  # one graph through both ranks
    parts = [dict(rank.named_parameters()) for rank in ranks]
    assert parts[0].keys() == dict(model.named_parameters()).keys()
    cut = 0
    for name, whole in model.named_parameters():
        grads = [torch.zeros_like(part[name]) if part[name].grad is None else part[name].grad for part in parts]
        if grads[0].shape == whole.shape:
            got = sum(grads)
        else:
            got = torch.cat(grads, dim=1 if len(grads[0]) == len(whole) else 0)
            cut += 1
        torch.testing.assert_close(got, whole.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # column linears have two parameters each, row linears one, norms one
    assert cut == len(model.blocks) * (7 * 2 + 3 + 4 + (2 * 2 + 1 if changes else 0))


def test_without_the_mean_over_ranks_a_cut_norm_is_wrong():
    """What `split_norms` asks for matters: each rank's own mean square gives another output."""
    model = tiny()
    exchange = Exchange(2)
    ranks = [tensor_parallel(model, rank, exchange) for rank in range(2)]
    for part in ranks:
        for block in part.blocks:
            block.attn1.norm_q.mean_over_ranks = None
    assert not torch.allclose(exchange.run(ranks, inputs(model))[0], model(*inputs(model)), atol=1e-3)


@pytest.mark.parametrize("changes", [{}, I2V])
def test_sequence_parallelism_through_the_seams_is_exact(changes):
    """Ranks with uneven runs of tokens, that share keys in the replaced attention only, compute what one does."""
    model = tiny(**changes)
    args = inputs(model)
    want = model(*args)
    exchange = Exchange(2)
    ranges = ((0, 10), (10, 18))

    class Shared(nn.Module):
        def __init__(self, rank):
            super().__init__()
            self.rank = rank

        def forward(self, q, k, v):
            k, v = (torch.cat(exchange(self.rank, part), dim=2) for part in (k, v))
            return attention(q, k, v).transpose(1, 2).flatten(2)

    class Cut:
        def __init__(self, rank):
            self.rank = rank

        def cut(self, txt, img, rope):
            assert txt.shape == (2, 0, 48)
            return txt, img[:, slice(*ranges[self.rank])], rope.narrow(*ranges[self.rank])

        def join(self, img):
            return torch.cat(exchange(self.rank, img), dim=1)

    ranks = [copy.deepcopy(model) for _ in range(2)]
    for rank, part in enumerate(ranks):
        part.sequence_cut = Cut(rank)
        for pattern in model.parallel_plan().attention:
            for i in range(len(model.blocks)):
                replace(part, pattern.replace("*", str(i)), Shared(rank))
    for out in exchange.run(ranks, args):
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


def test_plan_leaves_nothing_of_a_block_by_accident():
    """In a block, every linear is cut one way, every norm of queries and keys too; the embedders stay whole."""
    model = tiny(**I2V)
    plan, modules = model.parallel_plan(), dict(model.named_modules())
    cut = {p.replace("*", "1") for p in (*plan.column, *plan.row)}
    assert cut == {n for n, m in modules.items() if isinstance(m, nn.Linear) and n.startswith("blocks.1.")}
    norms = {n for n, m in modules.items() if type(m).__name__ == "WidthRMSNorm" and n.startswith("blocks.1.")}
    assert {p.replace("*", "1") for p in plan.split_norms} == norms and len(norms) == 5
    assert modules[plan.attention[0].replace("*", "0")] is model.blocks[0].attn1.attention
    context = {f"blocks.*.attn2.{name}" for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")}
    assert plan.token_streams.keys() == (plan.column.keys() | plan.row.keys()) - context


def test_compiled_blocks_keep_names_and_output():
    """Compilation is per block and leaves the names of the weights alone."""
    model = tiny()
    want, names = model(*inputs(model)), list(model.state_dict())
    compile_blocks(model, "eager")
    torch.testing.assert_close(model(*inputs(model)), want)
    assert list(model.state_dict()) == names


def test_what_does_not_fit_says_so(tmp_path):
    """Errors name the argument or condition, what was found and what is needed."""
    model = tiny(**I2V)
    x, t, conditions = inputs(model)
    with pytest.raises(ValueError, match=r"missing \['visual'\], unknown \['pooled'\]"):
        model(x, t, {"text": conditions["text"], "image_embeds": conditions["image_embeds"], "pooled": t})
    with pytest.raises(ValueError, match=r"H and W multiples of 2 is needed"):
        model(x[..., :5], t, conditions)
    with pytest.raises(ValueError, match=r"'text' has shape \(2, 9, 20\), \[B, L <= 8, 20\]"):
        model(x, t, {**conditions, "text": torch.zeros(2, 9, 20)})
    with pytest.raises(ValueError, match=r"'visual' has shape .* \[2, 5 or 8, 3, 4, 6\]"):
        model(x, t, {**conditions, "visual": conditions["visual"][:, :4]})
    for arguments, message in (
        ({}, r"wan has no \['num_attention_heads'"),
        ({"variant": "t2v-2B"}, "variant='t2v-2B' is not one of"),
        ({"variant": "t2v-14B", "config": "x"}, "both name the sizes"),
        (TINY | {"in_channels": 8}, "in_channels=8 must be out_channels=4"),
        (TINY | {"attention_head_dim": 13}, "attention_head_dim=13 must be even"),
        (TINY | {"text_length": 0}, "text_length=0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Wan(**arguments)
    with pytest.raises(FileNotFoundError, match=r"config=.*there is no"):
        Wan(config=str(tmp_path))
    for config, message in (
        ({"_class_name": "FluxTransformer2DModel"}, "not of a Wan transformer"),
        ({"pos_embed_seq_len": 514}, r"pos_embed_seq_len=514, only \[None\]"),
        ({"num_layers": "30"}, "num_layers='30' must be int"),
        ({"add_ref_conv": True}, r"add_ref_conv=True, only \[False\]"),
        ({"window_size": [8, 8]}, r"window_size=\[8, 8\], only"),
        ({"dim": 24, "num_heads": 2, "qk_norm": False}, "qk_norm=False, only"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            Wan(config=str(tmp_path))
