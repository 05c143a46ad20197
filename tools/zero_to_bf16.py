"""Turn a training checkpoint, of any booster, into bfloat16 safetensors for inference and other programs.

python tools/zero_to_bf16.py CHECKPOINT OUT [--max_shard_size 80GB] [--safe_serialization] [--ema] [--tag NAME]

The checkpoint of a LoRA run holds adapters alone: they are written as peft reads them, or with --merge_lora the whole
model with the adapters added, which takes host memory for the model in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.adapters import PEFT_CONFIG, merge_adapters, peft_config
from opensora_like.checkpoint.export import checkpoint_weights, export_weights, parse_size
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.models.lora import file_name, is_adapter
from opensora_like.settings import RunConfig
from opensora_like.training.build import build_model

WHOLE, ADAPTERS = "diffusion_pytorch_model", "adapter_model"  # names that diffusers and peft look for


class Loaded(dict[str, Tensor]):
    """Weights in memory, as `export_weights` takes them."""

    def num_elements(self, name: str) -> int:
        return self[name].numel()


def merged(config: RunConfig, folder: Path, *, use_ema: bool) -> Loaded:
    """The run's base model with the adapters of the checkpoint added."""
    model = build_model(dataclasses.replace(config, lora_config=None, lora_checkpoint=None))
    merge_adapters(model, str(folder), where="checkpoint", use_ema=use_ema)
    return Loaded(model.state_dict())


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder (its newest one)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_shard_size", default="80GB", help="bytes, or with KB, MB, GB, KiB, MiB, GiB")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors: the only form there is")
    parser.add_argument("--ema", action="store_true", help="the moving average instead of the weights")
    parser.add_argument("-t", "--tag", help="name of the checkpoint in a run's folder")
    parser.add_argument("--merge_lora", action="store_true", help="of a LoRA run: the whole model, adapters added")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    given = parser.parse_args(arguments)
    source = Path(given.checkpoint) / given.tag if given.tag else Path(given.checkpoint)
    folder = layout.find_checkpoint(str(source), source)
    weights, base_name = checkpoint_weights(folder, use_ema=given.ema), WHOLE
    is_lora = all(is_adapter(name) for name in weights)
    if given.merge_lora and not is_lora:
        raise ValueError(f"--merge_lora: {str(folder)!r} holds whole weights, there is nothing to merge; leave it out")
    config = read_config(folder / "config.py").config if is_lora else None
    if given.merge_lora:
        weights = merged(config, folder, use_ema=given.ema)
    elif is_lora:
        weights, base_name = Loaded({file_name(name): weights[name] for name in weights}), ADAPTERS
    max_shard_size = parse_size(given.max_shard_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]

    def work() -> int:
        export_weights(
            weights,
            given.out,
            max_shard_size=max_shard_size,
            dtype=dtype,
            base_name=base_name,
            on_file=lambda path: print(f"wrote {path}"),
        )
        if base_name == ADAPTERS:
            (given.out / PEFT_CONFIG).write_text(peft_config(config.lora_config, config.model.get("from_pretrained")))
        shutil.copyfile(folder / "config.py", given.out / "config.py")
        print(f"{len(weights)} tensors of {folder} in {given.dtype}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
