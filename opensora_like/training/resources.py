"""Predicts work and memory of a training step from a config, on ``meta`` tensors: no weights, no GPU."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from opensora_like.datasets.bucket import BucketShape
from opensora_like.datasets.cost import CostModel, Grid
from opensora_like.models.autoencoders.planning import _LiveBytes, plan_encode
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.models.layers import Attention
from opensora_like.registry import MODELS, build

CLIP_TOKENS = 77  # of an image embedding where a model takes one
PROBES = ((1, 16, 32), (4, 16, 32), (8, 32, 32))  # latents (T, H, W) in patches at which a model is measured


class Gpu(NamedTuple):
    """Args: gib: memory that a process can have. tflops: dense bfloat16, as the vendor states it."""

    gib: float
    tflops: float


GPUS = {
    "b200": Gpu(178.0, 2250.0),
    "h200": Gpu(139.0, 989.0),
    "h100": Gpu(79.0, 989.0),
    "a100-80g": Gpu(79.0, 312.0),
    "a100-40g": Gpu(39.5, 312.0),
    "l40s": Gpu(44.5, 362.0),
    "rtx4090": Gpu(23.5, 165.0),
}


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


@dataclass(frozen=True)
class ModelUse:
    """What a denoiser takes.

    Args:
        num_parameters, num_trainable: elements.
        forward: one forward.
        step: a forward and a backward, with what checkpointed blocks compute again. Multiplications and additions
            are counted each; attention counts twice its forward in the backward.
        saved: tensors kept for the backward if no block were checkpointed, without weights.
        peak: most memory alive at once in forward and backward, on top of weights and gradients.
    """

    num_parameters: int
    num_trainable: int
    forward: Work
    step: Work
    saved: Line
    peak: Line


def build_on_meta(section: Mapping[str, Any], *, where: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of a config without memory for its weights, which are neither read nor drawn."""
    section = {k: v for k, v in section.items() if k != "from_pretrained"}
    with torch.device("meta"):
        return build(section, MODELS, where=where).to(dtype)


def measure_model(model: Denoiser, *, text_length: int, probes: tuple[tuple[int, int, int], ...] = PROBES) -> ModelUse:
    """Measure a denoiser on ``meta`` at three sizes and lay curves through them.

    Args:
        model: as `build_on_meta` makes it; its attention is exchanged for one that only keeps and counts what
            fused attention keeps and computes, so it is of no other use afterwards.
        text_length: text tokens.

    Raises:
        ValueError: a condition that this module does not know how to make.
    """
    count_attention(model)
    tokens, forward, step, saved, peak = [], [], [], [], []
    for time, rows, columns in probes:
        latents = (time, rows * model.patch_size, columns * model.patch_size)
        inputs = example_inputs(model, latents, text_length=text_length)
        tokens.append(time * rows * columns)
        flops, per_block = _forward_flops(model, inputs)
        forward.append(flops)
        live, calls = _peak_bytes(model, inputs)
        again = sum(per_block[name] for name, count in calls.items() if count > 1)
        step.append(3 * flops + again)
        peak.append(live)
        saved.append(saved_bytes(model, inputs))
    parameters = list(model.parameters())
    return ModelUse(
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        forward=_parabola(tokens, forward),
        step=_parabola(tokens, step),
        saved=_line(tokens[-2:], saved[-2:]),
        peak=_line(tokens[-2:], peak[-2:]),
    )


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
        "image_embeds": lambda: (CLIP_TOKENS, _width(model, "sizes.image_dim", "image_dim")),
    }
    if unknown := sorted(model.condition_names - made.keys()):
        raise ValueError(f"the shapes of conditions {unknown} of {type(model).__name__} are not known; add them here")
    options = {"dtype": weight.dtype, "device": weight.device}
    conditions = {name: torch.zeros(batch_size, *made[name](), **options) for name in sorted(model.condition_names)}
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


def _forward_flops(model: Denoiser, inputs: tuple) -> tuple[int, dict[str, int]]:
    """Operations of a forward, whole and by block."""
    attention = [m for m in model.modules() if isinstance(m, _CountingAttention)]
    per_block: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def now() -> int:
            return counter.get_total_flops() + sum(m.flops for m in attention)

        began = now()
        hooks = []
        for name, block in blocks_of(model).items():
            hooks.append(block.register_forward_pre_hook(lambda *_, n=name: per_block.update({n: -now()})))
            hooks.append(block.register_forward_hook(lambda *_, n=name: per_block.update({n: per_block[n] + now()})))
        model(*inputs)
        total = now() - began
    for hook in hooks:
        hook.remove()
    return total, per_block


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


class _no_checkpointing:  # noqa: N801, a context manager reads as a verb
    """All blocks keep their activations inside; `_num_recomputed` is what every denoiser of ours decides by."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = getattr(self.model, "_num_recomputed", None)
        self.model.set_grad_checkpoint(False)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.model._num_recomputed = self.before


def _peak_bytes(model: Denoiser, inputs: tuple) -> tuple[int, Counter[str]]:
    """Most bytes alive in forward and backward, and how often each block ran. Gradients of weights go at once."""
    calls: Counter[str] = Counter()
    hooks = [b.register_forward_pre_hook(lambda *_, n=n: calls.update([n])) for n, b in blocks_of(model).items()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
    live = _LiveBytes()
    with live:
        model(*inputs).float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    gc.collect()
    return live.peak, calls


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
    uses, pixels = [], []
    for shape in (small, large):
        uses.append(plan_encode(autoencoder, shape.num_frames, shape.height, shape.width))
        pixels.append(shape.num_frames * shape.height * shape.width)
    parameters = sum(p.numel() for p in autoencoder.parameters())
    if pixels[0] == pixels[1]:
        return EncodeUse(uses[1].flops / pixels[1], uses[1].peak_bytes / pixels[1], 0.0, parameters)
    line = _line(pixels, [use.peak_bytes for use in uses])
    return EncodeUse(uses[1].flops / pixels[1], line.per_token, line.fixed, parameters)


def cost_model(model: ModelUse, *, encode_flops_per_pixel: float = 0.0, text_flops: float = 0.0) -> CostModel:
    """A cost model in TFLOP, rounded to four digits, so that it does not change with a version of torch.

    Args:
        text_flops: of the text encoders, for one caption.
    """

    def rounded(flops: float) -> float:
        return float(f"{max(flops, 0.0) / 1e12:.3e}")

    return CostModel(
        per_token=rounded(model.step.per_token),
        per_token_pair=rounded(model.step.per_pair),
        per_sample=rounded(model.step.fixed + text_flops),
        per_pixel=rounded(encode_flops_per_pixel),
    )


def grid_of(model: Denoiser, autoencoder: Autoencoder) -> Grid:
    """How clips become tokens of this model."""
    return Grid(autoencoder.temporal_stride, autoencoder.spatial_stride * model.patch_size)


class Static(NamedTuple):
    """Bytes per rank that do not depend on the micro-batch."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


# booster -> (bytes of working weights, of gradients, of masters and Adam, and which of the three are cut over ranks)
LAYOUTS: dict[str, tuple[float, float, float, str]] = {
    "ddp": (4 + 2, 4, 8, ""),  # autocast keeps a bfloat16 copy of the weights it used
    "zero0": (2, 2, 12, ""),
    "zero1": (2, 2, 12, "optimizer"),
    "zero2": (2, 2, 12, "optimizer gradients"),
    "zero3": (2, 2, 12, "optimizer gradients weights"),
    "fsdp2": (2, 4, 12, "optimizer gradients weights"),
}


def static_memory(
    use: ModelUse,
    *,
    layout: str,
    shards: int,
    tp_size: int = 1,
    ema: bool = False,
    bucket_elements: int = 20 * 2**20,
    moments: Callable[[float], float] = lambda n: n,
) -> Static:
    """Weights, gradients, masters and Adam, and the EMA of one rank, in mixed precision.

    Args:
        layout: a key of `LAYOUTS`.
        shards: ranks over which ZeRO or FSDP cuts (data and sequence parallel ones).
        bucket_elements: of a reduction bucket; two of them are in flight.
        moments: bytes of masters and optimizer -> those really kept (SGD without momentum keeps no moments).

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no memory model of booster layout {layout!r}; there is one of {sorted(LAYOUTS)}")
    weights, gradients, optimizer, cut = LAYOUTS[layout]
    trainable = use.num_trainable / tp_size
    frozen = (use.num_parameters - use.num_trainable) / tp_size

    def share(name: str) -> float:
        return 1 / shards if name in cut.split() else 1.0

    return Static(
        weights=(weights * trainable + 2 * frozen) * share("weights"),
        gradients=gradients * trainable * share("gradients"),
        optimizer=moments(optimizer) * trainable * share("optimizer"),
        ema=4 * trainable / shards if ema else 0.0,
        buffers=4.0 * min(bucket_elements, trainable) if layout not in ("ddp",) else 0.0,
    )
