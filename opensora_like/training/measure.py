"""Counts work and memory of a model on ``meta`` tensors: no weights, no GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from opensora_like.datasets.bucket import BucketShape
from opensora_like.models.autoencoders.planning import _LiveBytes, plan_encode
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.models.layers import Attention
from opensora_like.registry import MODELS, build

IMAGE_TOKENS = 257  # of an image embedding where a model takes one
AUDIO_VECTORS = 176  # of 81 frames at 23 frames per second, where a model hears
PROBES = ((1, 16, 32), (4, 16, 32), (8, 32, 32))  # latents (T, H, W) in patches at which a model is measured


class Line(NamedTuple):
    """Bytes of one sample: fixed + per_token * latent tokens."""

    fixed: float
    per_token: float

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


class Work(NamedTuple):
    """Floating-point operations of one sample in L latent tokens: fixed + per_token * L + per_pair * L**2."""

    fixed: int
    per_token: int
    per_pair: int

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_pair * tokens**2


class ModelWork(NamedTuple):
    """Operations of a denoiser; multiplications and additions count each.

    Args:
        forward: one forward.
        step: a forward and a backward, with what checkpointed blocks compute again. Attention counts twice its
            forward in the backward, like matrix products.
    """

    forward: Work
    step: Work


class ModelMemory(NamedTuple):
    """Bytes that a denoiser takes on top of weights and their gradients.

    Args:
        saved: tensors kept for the backward if no block were checkpointed.
        peak: most alive at once in forward and backward, checkpointed as the model is set.
    """

    saved: Line
    peak: Line


def build_on_meta(section: Mapping[str, Any], *, where: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of a config without memory for its weights, which are neither read nor drawn."""
    section = {k: v for k, v in section.items() if k != "from_pretrained"}
    with torch.device("meta"):
        return build(section, MODELS, where=where).to(dtype)


def measure_work(model: Denoiser, *, text_length: int) -> ModelWork:
    """Count the operations of a denoiser on ``meta`` at three sizes and lay parabolas through them.

    Args:
        model: as `build_on_meta` makes it; its attention is exchanged for one that only keeps and counts what
            fused attention keeps and computes, so it is of no other use afterwards.
        text_length: text tokens.

    Raises:
        ValueError: a condition that this module does not know how to make.
    """
    count_attention(model)
    tokens, forward, step = [], [], []
    recomputed: set[str] | None = None
    for time, rows, columns in PROBES:
        inputs = _probe(model, (time, rows, columns), text_length)
        recomputed = _recomputed_blocks(model, inputs) if recomputed is None else recomputed
        flops = _forward_flops(model, inputs)
        tokens.append(time * rows * columns)
        forward.append(sum(flops.values()))
        step.append(3 * forward[-1] + sum(flops[name] for name in recomputed))
    return ModelWork(_parabola(tokens, forward), _parabola(tokens, step))


def measure_memory(model: Denoiser, *, text_length: int) -> ModelMemory:
    """Count the bytes that a denoiser on ``meta`` takes at two sizes; arguments as `measure_work`."""
    count_attention(model)
    tokens, saved, peak = [], [], []
    for time, rows, columns in PROBES[1:]:
        inputs = _probe(model, (time, rows, columns), text_length)
        tokens.append(time * rows * columns)
        saved.append(saved_bytes(model, inputs))
        peak.append(_peak_bytes(model, inputs))
    return ModelMemory(_line(tokens, saved), _line(tokens, peak))


# sizes of a small model of the same kind, on which the count of memory is compared with real tensors
SMALL: dict[str, dict[str, Any]] = {
    "mmdit": {
        "in_channels": 16,
        "patch_size": 2,
        "hidden_size": 96,
        "num_heads": 3,
        "axes_dim": (8, 12, 12),
        "depth": 2,
        "depth_single_blocks": 4,
        "context_in_dim": 64,
        "vec_in_dim": 32,
    },
    "wan": {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "ffn_dim": 192,
        "num_layers": 6,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 64,
        "freq_dim": 32,
        "text_length": 24,
    },
    "hunyuan_video": {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 4}
    | {"rope_axes_dim": (8, 12, 12), "in_channels": 16, "text_dim": 64, "pooled_dim": 32},
}
SMALL["flux"] = SMALL["mmdit"]
# settings of a section that are not taken over: sizes, files, and what is checkpointed, which is set instead
DROPPED: dict[str, tuple[str, ...]] = {
    "mmdit": ("from_pretrained", "grad_ckpt_settings", "grad_ckpt_setting"),
    "wan": ("from_pretrained", "variant", "config", "image_dim", "ungiven", "token_replace", "grad_checkpoint"),
    "hunyuan_video": ("from_pretrained", "variant", "grad_checkpoint"),
}
CHECKPOINTED: dict[str, dict[str, Any]] = {"mmdit": {"grad_ckpt_settings": (1, 2)}, "wan": {"grad_checkpoint": 2}}
CHECKPOINTED["hunyuan_video"] = {"grad_checkpoint": (1, 2)}


class CountError(NamedTuple):
    """Relative errors of predicted bytes: of saved tensors, and of the peak with a third or half of the blocks
    checkpointed."""

    saved: float
    peak: float


def memory_error(section: Mapping[str, Any], *, text_length: int = 24) -> CountError | None:
    """Compare `measure_memory` with tensors on the CPU, at a size it was not measured at.

    Args:
        section: of a model; its kinds of blocks are kept, its sizes replaced by `SMALL`. Wan is text-to-video then, as
            is a variant of HunyuanVideo.

    Returns: None where no small model of this type is known.
    """
    if section["type"] not in SMALL:
        return None
    kind = section["type"] if section["type"] in DROPPED else "mmdit"
    small = {k: v for k, v in section.items() if k not in DROPPED[kind]} | SMALL[kind] | CHECKPOINTED[kind]
    predicted = measure_memory(build_on_meta(small, where="model"), text_length=text_length)
    model = build(small, MODELS, where="model").to(torch.bfloat16)
    latents = (3, 20 * model.patch_size, 24 * model.patch_size)
    tokens = 3 * 20 * 24
    inputs = example_inputs(model, latents, text_length=text_length, batch_size=2)
    saved, peak = saved_bytes(model, inputs), _peak_bytes(model, inputs)
    return CountError(2 * predicted.saved.at(tokens) / saved - 1, 2 * predicted.peak.at(tokens) / peak - 1)


def _probe(model: Denoiser, patches: tuple[int, int, int], text_length: int) -> tuple:
    time, rows, columns = patches
    size = (time, rows * model.patch_size, columns * model.patch_size)
    return example_inputs(model, size, text_length=text_length)


def example_inputs(
    model: Denoiser, latents: tuple[int, int, int], *, text_length: int, batch_size: int = 1
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Arguments of a denoiser's forward, of its dtype and on its device.

    Args:
        latents: (T, H, W).

    Raises:
        ValueError: the model needs a condition of unknown shape.
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    channels = model.latent_channels
    made = {
        "text": lambda: (text_length, _width(model, "txt_in.in_features", "sizes.text_dim", "text_dim")),
        "pooled": lambda: (_width(model, "vector_in.in_layer.in_features", "pooled_dim"),),
        "guidance": lambda: (),
        "visual": lambda: (1 + channels, *latents),
        "image_embeds": lambda: (IMAGE_TOKENS, _width(model, "sizes.image_dim", "image_dim")),
        "audio": lambda: (AUDIO_VECTORS, _width(model, "audio_dim")),
    }
    if unknown := sorted(model.condition_names - made.keys()):
        raise ValueError(f"the shapes of conditions {unknown} of {type(model).__name__} are not known; add them here")
    options = {"dtype": weight.dtype, "device": weight.device}
    conditions = {name: torch.zeros(batch_size, *made[name](), **options) for name in sorted(model.condition_names)}
    conditions["text"] = torch.ones_like(conditions["text"])  # rows of zeros are padding to some models
    t_B = torch.full((batch_size,), 0.5, device=weight.device)
    return torch.zeros(batch_size, channels, *latents, **options), t_B, conditions


def _width(model: nn.Module, *paths: str) -> int:
    for path in paths:
        value: Any = model
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"{type(model).__name__} has none of {list(paths)}, which tell the width of a condition")


class _Kept(torch.autograd.Function):
    """Keeps what fused attention keeps for its backward: q, k, v, the result and a number per query."""

    @staticmethod
    def forward(ctx, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        b, n, length, _ = q_BNLD.shape
        out = v_BNLD.new_empty(b, length, n, v_BNLD.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q_BNLD, k_BNLD, v_BNLD, out, q_BNLD.new_empty(b, n, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _CountingAttention(nn.Module):
    """In the place of `Attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def forward(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        b, n, num_queries, width = q_BNLD.shape
        self.flops += 2 * b * n * num_queries * k_BNLD.shape[2] * (width + v_BNLD.shape[-1])
        out = _Kept.apply(q_BNLD.to(v_BNLD.dtype), k_BNLD.to(v_BNLD.dtype), v_BNLD)
        return out.transpose(1, 2).flatten(2)


def count_attention(model: nn.Module) -> None:
    """Exchange every `Attention` of a model for one that counts."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, _CountingAttention())


def blocks_of(model: Denoiser) -> dict[str, nn.Module]:
    """The repeated blocks by name, in the order of `ParallelPlan.blocks`."""
    patterns = [re.compile(re.escape(p).replace(r"\*", r"\d+")) for p in model.parallel_plan().blocks]
    return {name: m for p in patterns for name, m in model.named_modules() if p.fullmatch(name)}


def _forward_flops(model: Denoiser, inputs: tuple) -> dict[str, int]:
    """Operations of the matrix products and convolutions of a forward by block; "" is what is in no block."""
    flops: Counter[str] = Counter()
    names = {module: name for name, block in blocks_of(model).items() for module in block.modules()}

    def count(module: nn.Module, _: tuple, out: Tensor) -> None:
        flops[names.get(module, "")] += 2 * out.numel() * (module.weight.numel() // module.weight.shape[0])

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    for module in model.modules():
        if isinstance(module, _CountingAttention):
            module.flops = 0
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    for module in model.modules():
        if isinstance(module, _CountingAttention):
            flops[names.get(module, "")] += module.flops
    return dict(flops)


def _recomputed_blocks(model: Denoiser, inputs: tuple) -> set[str]:
    """The blocks that are checkpointed: what is saved inside of them never meets the hook around the model."""
    running: list[str] = []
    keeping: set[str] = set()

    def pack(tensor: Tensor) -> Tensor:
        keeping.update(running)
        return tensor

    hooks, blocks = [], blocks_of(model)
    for name, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        hooks.append(block.register_forward_hook(lambda *_: running.clear()))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return blocks.keys() - keeping


def saved_bytes(model: Denoiser, inputs: tuple) -> int:
    """Bytes that autograd keeps of a forward without checkpointing, each storage once, weights not counted."""
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with _no_checkpointing(model), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return sum(seen.values())


class _no_checkpointing:
    """All blocks keep their activations inside; `_num_recomputed` is what every denoiser of ours decides by."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = getattr(self.model, "_num_recomputed", None)
        self.model.set_grad_checkpoint(False)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.model._num_recomputed = self.before


def _peak_bytes(model: Denoiser, inputs: tuple) -> int:
    """Most bytes alive in forward and backward; gradients of weights are not counted, they go at once."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    live = _LiveBytes()
    with live:
        model(*inputs).float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return live.peak


def _parabola(x: list[int], y: list[int]) -> Work:
    """Through three points, exactly; the operations of a transformer are a polynomial of its tokens."""
    (x0, x1, x2), (y0, y1, y2) = (map(Fraction, x), map(Fraction, y))
    slope, next_slope = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    pair = (next_slope - slope) / (x2 - x0)
    token = slope - pair * (x0 + x1)
    return Work(round(y0 - token * x0 - pair * x0**2), round(token), round(pair))


def _line(x: list[int], y: list[int]) -> Line:
    per_token = (y[1] - y[0]) / (x[1] - x[0])
    return Line(y[0] - per_token * x[0], per_token)


class EncodeUse(NamedTuple):
    """What coding a clip takes, by its pixels (frames * height * width): operations, and bytes at the peak."""

    flops_per_pixel: float
    bytes_per_pixel: float
    fixed_bytes: float
    num_parameters: int


def measure_autoencoder(autoencoder: Autoencoder, small: BucketShape, large: BucketShape) -> EncodeUse:
    """Measure an autoencoder on ``meta`` at two sizes of clip; between them both numbers are nearly linear."""
    if not any(True for _ in autoencoder.parameters()):
        return EncodeUse(0.0, 0.0, 0.0, 0)  # rearranges pixels and nothing else
    uses, pixels = [], []
    for shape in (small, large):
        uses.append(plan_encode(autoencoder, shape.num_frames, shape.height, shape.width))
        pixels.append(shape.num_frames * shape.height * shape.width)
    parameters = sum(p.numel() for p in autoencoder.parameters())
    if pixels[0] == pixels[1]:
        return EncodeUse(uses[1].flops / pixels[1], uses[1].peak_bytes / pixels[1], 0.0, parameters)
    line = _line(pixels, [use.peak_bytes for use in uses])
    return EncodeUse(uses[1].flops / pixels[1], line.per_token, line.fixed, parameters)
