"""Tiny denoisers and batches on which layouts are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opensora_like.models.mmdit import MMDiT


def mmdit(*, heads: int = 4, mlp_ratio: float = 1.1, **settings: Any) -> MMDiT:
    """Widths that 2 and 4 ranks cannot share evenly where that is allowed."""
    return MMDiT(
        5, 6, context_in_dim=7, hidden_size=10 * heads, num_heads=heads, depth=1, depth_single_blocks=2,
        axes_dim=(2, 4, 4), mlp_ratio=mlp_ratio, patch_size=1, **settings,
    )  # fmt: skip


def frozen() -> nn.Module:
    """All but the attention of the single blocks, as in partial fine-tuning."""
    model = mmdit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "single_blocks" in name and "modulation" not in name
    return model


def wan(*, token_replace: bool = False) -> nn.Module:
    from opensora_like.models.wan import Wan

    sizes = {"num_attention_heads": 4, "attention_head_dim": 6, "ffn_dim": 20, "num_layers": 2, "freq_dim": 8}
    given = {"in_channels": 5, "out_channels": 5, "text_dim": 7, "text_length": 4, "token_replace": token_replace}
    return Wan(grad_checkpoint=1, **given, **sizes)


def speech() -> nn.Module:
    from opensora_like.models.fantasy_talking import FantasyTalking

    sizes = {"num_attention_heads": 4, "attention_head_dim": 6, "ffn_dim": 20, "num_layers": 2, "freq_dim": 8}
    sizes |= {"audio_dim": 3, "audio_width": 5, "in_channels": 11, "out_channels": 5}
    return FantasyTalking(text_dim=7, text_length=4, grad_checkpoint=1, **sizes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": mmdit,
    "split": lambda: mmdit(
        fused_qkv=False, use_liger_rope=True, guidance_embed=True, cond_embed=True, grad_ckpt_settings=(1, 1)
    ),
    "frozen": frozen,
    "wan": wan,
    "ti2v": lambda: wan(token_replace=True),
    "speech": speech,
}
# name -> (samples, text tokens, T, H, W); two or four ranks can share none of these sequences evenly
DATA: dict[str, tuple[int, int, int, int, int]] = {
    "odd": (8, 3, 2, 3, 3),
    "long text": (2, 13, 1, 1, 2),
    "few tokens": (2, 1, 1, 1, 2),
    "single": (1, 2, 1, 3, 3),
}


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Nothing is exactly 0 or 1: no gradient is hidden behind a gate, no norm's scale is its neutral one."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def data(model: str, name: str, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """The global batch of a step: x, t, conditions, target."""
    generator = torch.Generator().manual_seed(1000 + step)
    count, text, t, h, w = DATA[name]
    if model in ("wan", "ti2v", "speech"):
        text, t, h, w = *(3, 3), 2 * h, 2 * w

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    conditions = {"text": draw(text, 7), "pooled": draw(6), "guidance": draw().abs(), "visual": draw(6, t, h, w)}
    wanted = {"speech": ["text", "visual", "audio"], "ti2v": ["text", "visual"]}
    wanted |= {"split": ["text", "pooled", "guidance", "visual"], "wan": ["text"]}
    wanted = wanted.get(model, ["text", "pooled"])
    x, target, times = draw(5, t, h, w), draw(5, t, h, w), torch.rand(count, generator=generator)
    if model == "speech":
        conditions["audio"] = draw(11, 3)
        conditions["audio"][1, 6:], conditions["audio"][2] = 0.0, 0.0  # a shorter sound, and none
    return x, times, {name: conditions[name] for name in wanted}, target
