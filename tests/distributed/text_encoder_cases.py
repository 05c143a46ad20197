"""Compares whole and cut T5 encoders on two processes and prints what came out, for the tests.

    torchrun --nproc_per_node 2 text_encoder_cases.py FOLDER

Training runs with a cut encoder leave their metrics in FOLDER/{layout}/toy.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from opensora_like import runtime
from opensora_like.boosters.text_encoder_parallel import cut_t5
from opensora_like.models.text_encoders import T5TextEncoder
from opensora_like.training.trainer import train
from tests.training.harness import build_toy

SIZES = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "dropout_rate": 0.0}
RUNS = {
    "hybrid": {"type": "colossalai", "plugin": "hybrid", "plugin_config": {"tp_size": 2}},
    "fsdp2": {"type": "fsdp2", "tp_size": 2},
    "fsdp2 alone": {"type": "fsdp2"},
}
CAPTIONS = ["a cat", "", "a longer caption than the others"]


def build(config_class: type, model_class: type, projection: str, num_heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, num_heads=num_heads, feed_forward_proj=projection)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim == 1 or "bias" in name or "shared" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model.requires_grad_(False)


@torch.no_grad()
def compare(model: nn.Module) -> str:
    cut = copy.deepcopy(model)
    cut_t5(cut, dist.group.WORLD)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    hidden = (torch.arange(40) < 25).long().expand(2, -1)
    for mask in (None, hidden):
        a, b = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (model, cut))
        difference = ((a - b).abs().max() / a.abs().max()).item()
        if difference > 1e-6:
            return f"differs by {difference}"
    sizes = [sum(p.numel() for n, p in m.named_parameters() if "block" in n) for m in (model, cut)]
    return "same, smaller" if sizes[1] < 0.53 * sizes[0] else f"same, {sizes}"


def run_with_cut_encoder(layout: str, folder: Path) -> str:
    """Three steps of a whole run as its config builds it; its embeddings against those of its encoder, uncut."""
    arguments = [f"--booster={RUNS[layout]}", "--encoders.text.tp=True", "--steps=3"]
    try:
        run = build_toy(folder / layout, *arguments)
    except ValueError as problem:
        return f"{layout}: {problem}"
    cut = run.step_fn.encode.encoders["text"]
    tiny = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    whole = T5TextEncoder(max_length=16, dtype="fp32", tiny=tiny)
    a, b = (encoder.encode(CAPTIONS) for encoder in (whole, cut))
    difference = ((a - b).abs().max() / a.abs().max()).item()
    sizes = [sum(p.numel() for n, p in e.named_parameters() if "block" in n) for e in (whole, cut)]
    train(run)
    same = "same" if difference <= 1e-6 else f"differs by {difference}"
    return f"{layout}: {same}, {'smaller' if sizes[1] < 0.53 * sizes[0] else sizes}"


def main() -> None:
    runtime.start()
    lines = [
        f"gated t5: {compare(build(T5Config, T5EncoderModel, 'gated-gelu'))}",
        f"relu t5: {compare(build(T5Config, T5EncoderModel, 'relu'))}",
        f"gated umt5: {compare(build(UMT5Config, UMT5EncoderModel, 'gated-gelu'))}",
    ]
    options = {"tiny": {"hidden_size": 16, "num_heads": 2}, "max_length": 16, "dtype": "fp32"}
    whole, cut = T5TextEncoder(**options), T5TextEncoder(**options, tp=True)
    cut.cut(lambda model: cut_t5(model, dist.group.WORLD))
    a, b = (encoder.encode(CAPTIONS) for encoder in (whole, cut))
    lines.append("encoder: same, smaller" if (a - b).abs().max() <= 1e-6 * a.abs().max() else "encoder: differs")
    try:
        compare(build(T5Config, T5EncoderModel, "relu", num_heads=3))
    except ValueError as problem:
        lines.append(str(problem))
    lines += [run_with_cut_encoder(layout, Path(sys.argv[1])) for layout in RUNS]
    print("\n".join(lines) + "\n", end="", flush=True)
    runtime.finish()


if __name__ == "__main__":
    main()
