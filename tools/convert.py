"""Convert weights between layouts, of a training checkpoint, a safetensors file or a folder of shards; and configs.

python tools/convert.py IN OUT --model mmdit --to split [--rope interleaved:liger] [--raw] [--dtype bf16]
python tools/convert.py IN OUT --model wan --to original
python tools/convert.py config SEED.yaml OUT.py [--bucket 480x832x81]

Layouts of mmdit: `fused` (one linear for queries, keys, values: the names of the published Open-Sora weights), `split`,
and `diffusers` (of its FLUX transformer: models without visual condition); which one IN has is seen from its names.
`--rope OLD:NEW` reorders the rotated pairs of queries and keys between `interleaved` and `liger`; nothing in a file
says which it has, but in diffusers they are always interleaved. Layouts of wan: `diffusers` (this program's own,
and that of the published folders) and `original` (the single files). A training checkpoint gives its EMA where it has
one, with --raw its weights.

`config` writes the settings of a NeMo DFM or Automodel YAML of Wan as a config, and lists each key that has no
counterpart with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor

from opensora_like.checkpoint.export import WHOLE, export_weights, parse_size
from opensora_like.checkpoint.weights import read_weights
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.models.fantasy_talking import convert as fantasy_talking
from opensora_like.models.mmdit import convert as mmdit
from opensora_like.models.mmdit.diffusers_layout import from_diffusers, is_diffusers, to_diffusers
from opensora_like.models.wan import convert as wan
from opensora_like.runtime import DTYPES
from opensora_like.training.import_yaml import config_source, import_config, read_yaml

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# model -> layout -> what brings either layout to it; each leaves weights that have it as they are
LAYOUTS: dict[str, dict[str, Convert]] = {
    "mmdit": {
        "fused": lambda weights: mmdit.fuse_qkv(from_diffusers(weights)),
        "split": lambda weights: mmdit.split_qkv(from_diffusers(weights)),
        "diffusers": to_diffusers,
    },
    "wan": {"diffusers": wan.to_diffusers, "original": lambda weights: wan.to_original(wan.to_diffusers(weights))},
    "fantasy_talking": {"diffusers": fantasy_talking.to_diffusers, "original": fantasy_talking.to_original},
}
ROPES: dict[str, Convert] = {
    "interleaved:liger": mmdit.to_liger_rope,
    "liger:interleaved": mmdit.to_interleaved_rope,
}


def convert(weights: Mapping[str, Tensor], *, model: str, to: str, rope: str | None) -> dict[str, Tensor]:
    """Weights in another layout.

    Raises:
        ValueError: no such layout, a rope order for a model without, or weights that are not of this model.
    """
    if to not in LAYOUTS[model]:
        raise ValueError(f"--to {to!r}: {model} has the layouts {sorted(LAYOUTS[model])}")
    if rope is not None and model != "mmdit":
        raise ValueError(f"--rope {rope!r}: only mmdit has two orders of rotated pairs; remove it")
    if model == "fantasy_talking":
        weights = fantasy_talking.flatten(weights)
    if not any(name.split(".")[-1] in ("weight", "bias") and "blocks." in name for name in weights):
        raise ValueError(f"no weights of {model} blocks among {len(weights)} tensors: {sorted(weights)[:3]}")
    if rope is not None and is_diffusers(weights):
        raise ValueError(f"--rope {rope!r}: in diffusers' layout the pairs are interleaved; convert without it first")
    return LAYOUTS[model][to](weights if rope is None else ROPES[rope](weights))


class _Loaded(dict[str, Tensor]):
    """Tensors in memory, as `export_weights` reads them."""

    def num_elements(self, name: str) -> int:
        return self[name].numel()


def prepare_config(arguments: list[str]) -> Callable[[], int]:
    """The command ``config``."""
    parser = argparse.ArgumentParser(prog="convert.py config", description="A NeMo YAML of Wan as a config.")
    parser.add_argument("source", type=Path, help="the YAML")
    parser.add_argument("out", type=Path, help="the config to write, .py; it must not exist")
    parser.add_argument("--bucket", default="480x832x81", help="height x width x frames of the clips")
    given = parser.parse_args(arguments)
    if given.out.suffix != ".py" or given.out.exists():
        raise ValueError(f"{str(given.out)!r} must be a new file that ends in .py")
    imported = import_config(read_yaml(given.source), bucket=given.bucket)
    text = config_source(imported, source=given.source.name)

    def work() -> int:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
        read_config(given.out)
        print("\n".join(imported.lines()))
        print(f"wrote {given.out}: {len(imported.carried)} keys carried, {len(imported.lost)} left out")
        return 0

    return work


def prepare(arguments: list[str]) -> Callable[[], int]:
    if arguments[:1] == ["config"]:
        return prepare_config(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint, a run's folder (its newest one), a file or a folder of shards")
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--model", choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--to", required=True, help="the layout to write")
    parser.add_argument("--rope", choices=sorted(ROPES), help="order of rotated pairs, old:new (mmdit)")
    parser.add_argument("--raw", action="store_true", help="the weights of a checkpoint instead of its EMA")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as it is")
    parser.add_argument("--max_shard_size", default="80GB", help="bytes, or with KB, MB, GB, KiB, MiB, GiB")
    given = parser.parse_args(arguments)
    max_shard_size = parse_size(given.max_shard_size)
    source, out = Path(given.source).resolve(), given.out.resolve()
    if out == source or (out == source.parent and source.name.startswith(WHOLE)):
        raise ValueError(f"{given.source!r} would be written over while it is read; choose another folder than its own")
    weights = read_weights(given.source, use_ema=not given.raw, where="source")
    converted = _Loaded(convert(weights, model=given.model, to=given.to, rope=given.rope))

    def work() -> int:
        dtype = DTYPES[given.dtype] if given.dtype else None
        export_weights(
            converted,
            given.out,
            max_shard_size=max_shard_size,
            dtype=dtype,
            on_file=lambda path: print(f"wrote {path}"),
        )
        print(f"{len(weights)} tensors of {given.source} -> {len(converted)} in layout {given.to}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
