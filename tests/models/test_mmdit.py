"""The MMDiT: recorded numbers of the published system, the seam, layouts, recomputation, precision."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.models.base import Denoiser
from opensora_like.models.layers import build_rope
from opensora_like.models.mmdit import MMDiT, convert, position_ids, unpatchify
from opensora_like.registry import MODELS, build

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = ["mmdit_fused_small_a", "mmdit_split_i2v_small_a"]
TINY = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": (4, 6, 6),
}
PUBLISHED = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": (16, 56, 56),
}


def tiny(seed: int = 0, **changes) -> MMDiT:
    """A small model all of whose weights matter; `cond_in` too."""
    torch.manual_seed(seed)
    model = MMDiT(**(TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5))
    return model


def inputs(model: MMDiT, *, batch_size: int = 2, frames: int = 3, height: int = 4, width: int = 6, seed: int = 1):
    """(x, t, conditions) that fit `model`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    c = model.latent_channels
    conditions = {"text": draw(batch_size, 5, TINY["context_in_dim"]), "pooled": draw(batch_size, TINY["vec_in_dim"])}
    if model.guidance_embed:
        conditions["guidance"] = torch.full((batch_size,), 4.0)
    if model.cond_embed:
        conditions["visual"] = draw(batch_size, 1 + c, frames, height, width)
    t = torch.rand(batch_size, generator=generator)
    return draw(batch_size, c, frames, height, width), t, conditions


def recorded(name: str):
    """(facts, tensors, the model with the recorded weights)."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = build({"type": "flux", **facts["config"]}, MODELS)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    model.load_state_dict(weights, strict=True)
    return facts, tensors, model


@pytest.mark.parametrize("name", RECORDED)
def test_forward_and_gradients_reproduce_the_published_system(name):
    """Output, loss, every parameter's gradient norm and the recorded gradients agree with the recorded run."""
    facts, tensors, model = recorded(name)
    assert not tensors["inputs/txt_ids"].any() and (tensors["inputs/img_ids"] == tensors["inputs/img_ids"][:1]).all()
    img, txt = (tensors[f"inputs/{n}"].requires_grad_() for n in ("img", "txt"))
    out = model.forward_tokens(
        img,
        tensors["inputs/timesteps"],
        img_ids_LA=tensors["inputs/img_ids"][0],
        txt_BLD=txt,
        pooled_BD=tensors["inputs/y_vec"],
        guidance_B=tensors.get("inputs/guidance"),
        visual_BLC=tensors.get("inputs/cond"),
    )
    torch.testing.assert_close(out, tensors["output"], atol=1e-5, rtol=0)
    loss = out.square().mean()
    torch.testing.assert_close(loss, tensors["loss"], atol=0, rtol=1e-5)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"inputs.img": img.grad, "inputs.txt": txt.grad}
    for key, want in tensors.items():
        if key.startswith("grads/"):
            got = grads[key.removeprefix("grads/")]
            assert (got - want).norm() <= 1e-4 * want.norm(), key
    for key, want in facts["grad_norms"].items():
        assert grads[key].norm().item() == pytest.approx(want, rel=1e-4), key


@pytest.mark.parametrize("name", RECORDED)
def test_latents_and_tokens_go_through_the_same_numbers(name):
    """The seam (latents in, latents out) gives the recorded output, unpacked."""
    facts, tensors, model = recorded(name)
    size = {"num_frames": facts["sizes"]["T"], "height": facts["sizes"]["H"], "width": facts["sizes"]["W"]}
    conditions = {"text": tensors["inputs/txt"], "pooled": tensors["inputs/y_vec"]}
    if "inputs/guidance" in tensors:
        conditions["guidance"] = tensors["inputs/guidance"]
    if "inputs/cond" in tensors:
        conditions["visual"] = unpatchify(tensors["inputs/cond"], 2, **size)
    x = unpatchify(tensors["inputs/img"], 2, **size)
    out = model(x, tensors["inputs/timesteps"], conditions)
    assert out.shape == x.shape
    torch.testing.assert_close(out, unpatchify(tensors["output"], 2, **size), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes, num_parameters, num_tensors",
    [
        ({"fused_qkv": False, "use_liger_rope": True, "cond_embed": True}, 11_891_390_528, 1082),
        ({"guidance_embed": True}, 11_901_408_320, 780),
    ],
)
def test_published_sizes(changes, num_parameters, num_tensors):
    """The full-size models, built on meta, have the published numbers of parameters and tensors."""
    with torch.device("meta"):
        model = MMDiT(**PUBLISHED, **changes)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_tensors


def test_it_is_a_denoiser_and_starts_blind_to_given_frames():
    """A fresh model ignores its visual condition exactly, and fits the protocol."""
    torch.manual_seed(0)
    model = MMDiT(**TINY, cond_embed=True)
    assert isinstance(model, Denoiser)
    x, t, conditions = inputs(model)
    torch.testing.assert_close(
        model(x, t, conditions),
        model(x, t, conditions | {"visual": torch.zeros_like(conditions["visual"])}),
        rtol=0,
        atol=0,
    )


def test_samples_of_a_batch_do_not_mix():
    """A sample's velocity does not depend on what it is batched with."""
    model = tiny(guidance_embed=True, cond_embed=True)
    x, t, conditions = inputs(model, batch_size=3)
    whole = model(x, t, conditions)
    alone = model(x[1:2], t[1:2], {k: v[1:2] for k, v in conditions.items()})
    torch.testing.assert_close(whole[1:2], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_layouts_of_weights_compute_the_same(fused):
    """Fusing or splitting qkv, and permuting for the other rotary layout, leaves the output where it was."""
    model = tiny(fused_qkv=fused, guidance_embed=True)
    state = model.state_dict()
    want = model(*inputs(model))
    other = convert.split_qkv(state) if fused else convert.fuse_qkv(state)
    back = convert.fuse_qkv(other) if fused else convert.split_qkv(other)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    twice = convert.to_interleaved_rope(convert.to_liger_rope(state))
    assert all(torch.equal(twice[k], state[k]) for k in state)

    for weights, changes in [
        (other, {"fused_qkv": not fused}),
        (convert.to_liger_rope(state), {"fused_qkv": fused, "use_liger_rope": True}),
        (convert.to_liger_rope(other), {"fused_qkv": not fused, "use_liger_rope": True}),
    ]:
        converted = tiny(seed=9, guidance_embed=True, **changes)
        converted.load_state_dict(weights, strict=True)
        torch.testing.assert_close(converted(*inputs(model)), want, atol=1e-5, rtol=1e-5)


def test_incomplete_weights_are_not_converted():
    """A state dict that lacks a partner of what is to move is an error that names both."""
    state = tiny(fused_qkv=False).state_dict()
    del state["single_blocks.1.k_proj.bias"]
    with pytest.raises(ValueError, match=r"single_blocks.1.q_proj.bias' is there but 'single_blocks.1.k_proj.bias'"):
        convert.fuse_qkv(state)


@pytest.mark.parametrize("settings", [True, (1, 2), (100, 0)])
def test_recomputation_changes_no_bit(settings):
    """Loss and every gradient are identical with and without gradient checkpointing."""
    found = []
    for choice in (None, settings):
        model = tiny(grad_ckpt_settings=choice, cond_embed=True)
        loss = model(*inputs(model)).square().mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (again, grads_again) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_recomputation_runs_the_chosen_blocks_twice():
    """(a, b) recomputes the first a two-stream and the first b one-stream blocks, and only where gradients flow."""
    model = tiny()
    calls = []
    for kind in ("double_blocks", "single_blocks"):
        for i, block in enumerate(getattr(model, kind)):
            block.attention.register_forward_hook(lambda *_, tag=(kind, i): calls.append(tag))

    def runs(settings):
        calls.clear()
        model.set_grad_checkpoint(settings)
        model(*inputs(model)).sum().backward()
        return {tag: calls.count(tag) for tag in calls}

    d0, d1, s0, s1 = [(kind, i) for kind in ("double_blocks", "single_blocks") for i in range(2)]
    assert runs((1, 2)) == {d0: 2, d1: 1, s0: 2, s1: 2}
    assert set(runs(True).values()) == {2}
    assert set(runs(False).values()) == set(runs(None).values()) == {1}
    calls.clear()
    model.set_grad_checkpoint(True)
    with torch.no_grad():
        model(*inputs(model))
    assert len(calls) == 4


def test_half_precision_stays_close_to_float32():
    """bfloat16 weights, and float32 weights under autocast, give bfloat16 near the float32 output; gradients flow."""
    model = tiny(guidance_embed=True, cond_embed=True)
    x, t, conditions = inputs(model)
    want = model(x, t, conditions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x, t, conditions)
    mixed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.bfloat16()
    half = model(x, t, conditions)
    half.float().square().mean().backward()
    for out in (mixed, half):
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).norm() <= 0.05 * want.norm()


def test_time_is_not_rounded_to_the_weights_precision():
    """Two times that are one number in bfloat16 give different velocities of a bfloat16 model."""
    model = tiny().bfloat16()
    x, _, conditions = inputs(model, batch_size=1)
    near, far = torch.tensor([0.9961]), torch.tensor([0.9975])
    assert near.bfloat16() == far.bfloat16()
    assert not torch.equal(model(x, near, conditions), model(x, far, conditions))


def test_attention_and_sequence_can_be_replaced_from_outside():
    """A backend that cuts the joint sequence and puts its own attention in computes what one process does."""
    model = tiny()
    want = model(*inputs(model))
    stop = (5 + 18 + 1) // 2
    keys, parts, turn = {}, [], {}

    class Cut:
        def __init__(self, rank):
            self.range = (0, stop) if rank == 0 else (stop, 23)

        def cut(self, txt, img, rope):
            x = torch.cat([txt, img], dim=1)[:, slice(*self.range)]
            num_text = max(0, min(5, self.range[1]) - self.range[0])
            return x[:, :num_text], x[:, num_text:], rope.narrow(*self.range)

        def join(self, img):
            parts.append(img)
            return torch.cat([img, img.new_zeros(len(img), 18 - img.shape[1], img.shape[2])], dim=1)

    class Recording(torch.nn.Module):
        """Attention of this rank's queries to keys recorded from the whole run."""

        def __init__(self, inner, name):
            super().__init__()
            self.inner, self.name = inner, name

        def forward(self, q, k, v):
            if not turn:
                keys[self.name] = (k, v)
                return self.inner(q, k, v)
            whole_k, whole_v = keys[self.name]
            torch.testing.assert_close(whole_k[:, :, slice(*turn["range"])], k, atol=1e-5, rtol=1e-5)
            return self.inner(q, whole_k, whole_v)

    for kind in model.parallel_plan().attention:
        prefix, leaf = kind.split(".*.")
        for i, block in enumerate(getattr(model, prefix)):
            setattr(block, leaf, Recording(getattr(block, leaf), f"{prefix}.{i}"))
    model(*inputs(model))
    for rank in range(2):
        model.sequence_cut = Cut(rank)
        turn["range"] = model.sequence_cut.range
        model(*inputs(model))
    joined = unpatchify(torch.cat(parts, dim=1), 2, num_frames=3, height=4, width=6)
    torch.testing.assert_close(joined, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_parallel_plan_names_what_exists(fused):
    """Every path of the plan is there, sizes add up, and each big linear is cut one way."""
    model = tiny(fused_qkv=fused)
    plan = model.parallel_plan()
    modules = dict(model.named_modules())
    for pattern, sizes in plan.column.items():
        out_features = modules[pattern.replace("*", "1")].out_features
        assert sum(sizes) == out_features or not sizes
    for pattern, sizes in plan.row.items():
        assert sum(sizes) == modules[pattern.replace("*", "1")].in_features or not sizes
    for pattern in plan.head_counts:
        path, attribute = pattern.replace("*", "0").rsplit(".", 1)
        assert getattr(modules[path], attribute) == TINY["num_heads"]
    parameters = dict(model.named_parameters())
    assert all(pattern.replace("*", "0") in parameters for pattern in plan.per_head)
    assert plan.token_streams.keys() == plan.column.keys() | plan.row.keys()
    cut = {p.replace("*", "0") for p in (*plan.column, *plan.row)}
    blocks = ("double_blocks.0.", "single_blocks.0.")
    linears = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n.startswith(blocks)}
    assert linears - cut == {n for n in linears if n.endswith(".lin")}  # the modulations stay whole


def test_heads_can_be_dealt_to_ranks_by_the_plan():
    """Cutting linears as the plan says and summing the row outputs of two ranks equals one rank."""
    for fused in (True, False):
        model = tiny(fused_qkv=fused, depth_single_blocks=1, depth=0)
        plan = model.parallel_plan()
        block = model.single_blocks[0]
        x, vec = torch.randn(1, 7, 32), torch.randn(1, 32)
        rope = build_rope(position_ids(7, 1, 1), (4, 6, 6), theta=1e4, interleaved=True)
        want = block(x, vec, rope)
        state = {k: v.clone() for k, v in block.state_dict().items()}
        total = torch.zeros_like(x)
        for rank in range(2):
            part = tiny(fused_qkv=fused, depth_single_blocks=1, depth=0).single_blocks[0]
            part.num_heads //= 2
            for table, dim in ((plan.column, 0), (plan.row, 1)):
                for pattern, sizes in table.items():
                    if not pattern.startswith("single"):
                        continue
                    name = pattern.removeprefix("single_blocks.*.")
                    linear = getattr(part, name)
                    weight = state[f"{name}.weight"]
                    pieces = weight.split(list(sizes) or [weight.shape[dim]], dim=dim)
                    linear.weight = torch.nn.Parameter(torch.cat([p.chunk(2, dim)[rank] for p in pieces], dim))
                    if dim == 0:
                        bias = state[f"{name}.bias"].split(list(sizes) or [len(weight)])
                        linear.bias = torch.nn.Parameter(torch.cat([p.chunk(2)[rank] for p in bias]))
                    elif rank == 1:
                        linear.bias = None
            for name in ("modulation.lin", "norm.query_norm", "norm.key_norm"):
                owner = part.get_submodule(name)
                owner.load_state_dict({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(name + ".")})
            total += part(x, vec, rope) - x
        torch.testing.assert_close(x + total, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 33}, "hidden_size=33 .*num_heads=2"),
        ({"axes_dim": (4, 6, 8)}, r"adds up to 18.* = 16 wide"),
        ({"axes_dim": (3, 7, 6)}, "even"),
        ({"axes_dim": (8, 8)}, "three"),
        ({"in_channels": 18}, r"in_channels=18 .*patch_size \*\* 2 = 4"),
        ({"grad_ckpt_settings": (1, 2), "grad_ckpt_setting": (2, 2)}, r"\(1, 2\).*\(2, 2\)"),
        ({"grad_ckpt_settings": (1, -2)}, "two counts"),
    ],
)
def test_wrong_sizes_are_refused_with_both_numbers(changes, message):
    """The constructor names the argument and the numbers that do not fit."""
    with pytest.raises(ValueError, match=message):
        MMDiT(**(TINY | changes))


def test_wrong_conditions_are_refused():
    """Missing and unknown conditions, odd sizes and wrong channels raise ValueError that says what is needed."""
    model = MMDiT(**TINY, cond_embed=True)
    x, t, conditions = inputs(model)
    with pytest.raises(ValueError, match=r"missing \['pooled', 'text'\], unknown \['clip'\]"):
        model(x, t, {"clip": x, "visual": conditions["visual"]})
    with pytest.raises(ValueError, match=r"unknown \['guidance'\]"):
        model(x, t, conditions | {"guidance": t})
    with pytest.raises(ValueError, match=r"\[B, 4, T, H, W\]"):
        model(x[:, :3], t, conditions)
    with pytest.raises(ValueError, match="the mask"):
        model(x, t, conditions | {"visual": conditions["visual"][:, 1:]})
    with pytest.raises(ValueError, match="height 3, width 6"):
        model(x[..., :3, :], t, conditions | {"visual": conditions["visual"][..., :3, :]})
    assert MMDiT(**TINY, grad_ckpt_setting=(1, 2))._num_recomputed == (1, 2)
