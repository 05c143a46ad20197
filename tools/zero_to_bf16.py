"""Turn a training checkpoint, of any booster, into bfloat16 safetensors for inference and other programs.

python tools/zero_to_bf16.py CHECKPOINT OUT [--max_shard_size 80GB] [--safe_serialization] [--ema] [--tag NAME]

The checkpoint of a LoRA run holds adapters alone: they are written as peft reads them, with --lora_format kohya as
ComfyUI and kohya do (lora_kohya.safetensors, names of the original layout, with alpha), or with --merge_lora the whole
model with the adapters added, which takes host memory for the model in float32. So does a run with trainable_modules,
whose checkpoints hold these alone: the rest comes from where the run had it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.adapters import merge_adapters, peft_config
from opensora_like.checkpoint.export import WHOLE, checkpoint_weights, export_weights, parse_size
from opensora_like.checkpoint.facts import read_state
from opensora_like.checkpoint.lora_files import PEFT_CONFIG, PEFT_STEM, to_kohya
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.config_file import read_layers
from opensora_like.models.lora import file_name, is_adapter
from opensora_like.registry import MODELS
from opensora_like.settings import RunConfig
from opensora_like.training.build import build_model
from opensora_like.training.measure import build_on_meta

KOHYA = "lora_kohya"


class Loaded(dict[str, Tensor]):
    """Weights in memory, as `export_weights` takes them."""

    def num_elements(self, name: str) -> int:
        return self[name].numel()


def merged(config: RunConfig, folder: Path, *, use_ema: bool) -> Loaded:
    """The run's base model with the adapters of the checkpoint added."""
    model = build_model(dataclasses.replace(config, lora_config=None, lora_checkpoint=None))
    merge_adapters(model, str(folder), where="checkpoint", use_ema=use_ema)
    return Loaded(model.state_dict())


def write_published_config(config_file: Path, out: Path) -> None:
    """``config.json`` as diffusers reads it beside the weights, for a model of ours that diffusers has."""
    section = read_layers(config_file)[0]["model"]  # modules that the run imported may not be here
    MODELS.import_from_location()
    if section["type"] not in MODELS.module_dict:
        return
    model = build_on_meta(section, where="model")
    described = model.diffusers_config() if hasattr(model, "diffusers_config") else None
    if described is not None:
        (out / "config.json").write_text(json.dumps(described, indent=1) + "\n")


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder (its newest one)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_shard_size", default="80GB", help="bytes, or with KB, MB, GB, KiB, MiB, GiB")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors: the only form there is")
    parser.add_argument("--ema", action="store_true", help="the moving average instead of the weights")
    parser.add_argument("-t", "--tag", help="name of the checkpoint in a run's folder")
    parser.add_argument("--merge_lora", action="store_true", help="of a LoRA run: the whole model, adapters added")
    parser.add_argument(
        "--lora_format",
        choices=["peft", "kohya"],
        help="of a LoRA run: peft's folder (also diffusers'), or one file as kohya and ComfyUI name it; default peft",
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    given = parser.parse_args(arguments)
    source = Path(given.checkpoint) / given.tag if given.tag else Path(given.checkpoint)
    folder = layout.find_checkpoint(str(source), source)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]
    weights, base_name = checkpoint_weights(folder, use_ema=given.ema), WHOLE
    is_lora = all(is_adapter(name) for name in weights)
    if given.merge_lora and not is_lora:
        raise ValueError(f"--merge_lora: {str(folder)!r} holds whole weights, there is nothing to merge; leave it out")
    if given.lora_format and (given.merge_lora or not is_lora):
        raise ValueError(f"--lora_format {given.lora_format} is about adapters alone; leave it out")
    config = read_config(folder / "config.py").config if is_lora else None
    if "frozen" in read_state(folder):
        model = build_model(read_config(folder / "config.py").config)
        weights = Loaded({**model.state_dict(), **weights})
    if given.merge_lora:
        weights = merged(config, folder, use_ema=given.ema)
    elif given.lora_format == "kohya":
        named = to_kohya(weights, config.lora_config, build_on_meta(config.model, where="model"))
        weights, base_name = Loaded({n: t.to(dtype if t.ndim else t.dtype) for n, t in named.items()}), KOHYA
    elif is_lora:
        weights, base_name = Loaded({file_name(name): weights[name] for name in weights}), PEFT_STEM
    max_shard_size = parse_size(given.max_shard_size)

    def work() -> int:
        export_weights(
            weights,
            given.out,
            max_shard_size=max_shard_size,
            dtype=None if base_name == KOHYA else dtype,  # an alpha that is rounded is another strength
            base_name=base_name,
            on_file=lambda path: print(f"wrote {path}"),
        )
        if base_name == PEFT_STEM:
            (given.out / PEFT_CONFIG).write_text(peft_config(config.lora_config, config.model.get("from_pretrained")))
        if base_name == WHOLE:
            write_published_config(folder / "config.py", given.out)
        shutil.copyfile(folder / "config.py", given.out / "config.py")
        print(f"{len(weights)} tensors of {folder} in {given.dtype}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
