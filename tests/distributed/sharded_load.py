"""Loads weights whole and in parts with two processes and writes what came out, for test_sharded.

python sharded_load.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from forks import World  # noqa: E402

import opensora_like.training.optim as optim  # noqa: E402
from opensora_like.checkpoint.sharded import load_pretrained_sharded, open_source, plan_load  # noqa: E402
from opensora_like.checkpoint.weights import load_pretrained  # noqa: E402
from opensora_like.models.mmdit import MMDiT  # noqa: E402
from opensora_like.registry import BOOSTERS, build  # noqa: E402
from tests.training.harness import build_toy, train_toy  # noqa: E402

CPU = torch.device("cpu")
BIG = {
    "in_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 768,
    "num_heads": 12,
    "depth": 1,
    "depth_single_blocks": 3,
    "axes_dim": (16, 24, 24),
}
LAYOUTS = {
    "ddp": {"type": "ddp"},
    "fsdp2": {"type": "fsdp2"},
    "tp": {"type": "fsdp2", "tp_size": 2},
    "zero2": {"type": "colossalai", "plugin": "zero2"},
    "zero3": {"type": "deepspeed", "stage": 3},
}
MEASURED = {"fsdp2": "fp32", "zero2": "bf16"} | ({"zero3": "bf16"} if importlib.util.find_spec("deepspeed") else {})
CASES = [
    ("file.safetensors", "ddp"),
    ("file.safetensors", "fsdp2"),
    ("indexed", "tp"),
    ("made/toy", "tp"),
    ("indexed", "zero2"),
    ("file.pt", "fsdp2"),
]


def write_files(folder: Path) -> None:
    """Weights as one file without `cond_in` and with a prefix, as a folder with an index, and as torch writes it."""
    run = train_toy(folder / "made", "--steps", "1", "--model.cond-embed", "True")
    weights = {name: shard.reshape(run.booster.ranges()[name].shape) for name, shard in run.booster.master_shards()}
    text_only = {f"module.{n}": t.clone() for n, t in weights.items() if not n.startswith("cond_in")}
    save_file(text_only, folder / "file.safetensors")
    (folder / "indexed").mkdir()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: weights[n].bfloat16() for n in part}, folder / "indexed" / file)
    table = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps(table))
    torch.save(weights, folder / "file.pt")
    save_file({n: t.clone() for n, t in weights.items() if not n.startswith("img_in")}, folder / "lacks.safetensors")


def compare(rank: int, folder: Path) -> None:
    """Whole and in parts, every layout and kind of source; rank 0 and 1 each write which differ."""
    different = []
    for source, name in CASES:
        found = []
        for sharded in (True, False):
            run = build_toy(
                folder / f"{source.replace('/', '_')}_{name}_{sharded}",
                f"--booster={LAYOUTS[name]}",
                f"--model.from-pretrained={folder / source}",
                f"--load-sharded={sharded}",
            )
            found.append({n: t.clone() for n, t in run.booster.master_shards()})
            if run.lock is not None:
                run.lock.close()
        mine, theirs = found
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[n], theirs[n]) for n in mine):
            different.append(f"{source} {name}")
    (folder / f"different{rank}.json").write_text(json.dumps(different))


def build_without_asking(rank: int, folder: Path) -> None:
    """With `load_sharded` as it is: what the log says is all that the tests want."""
    for source in ("file.safetensors", "lacks.safetensors"):
        run = build_toy(
            folder / f"unasked_{source}",
            f"--booster={LAYOUTS['zero2']}",
            f"--model.from-pretrained={folder / source}",
            "--model.strict-load=False",
        )
        if run.lock is not None:
            run.lock.close()


def measure(rank: int, folder: Path, layout: str, sharded: bool) -> None:
    """Load some 200 MB; write the growth of the peak of host memory (VmHWM), bytes read, and the masters' sum."""
    path, read = folder / "big.safetensors", []
    booster = build(
        LAYOUTS[layout], BOOSTERS, where="booster", dtype=MEASURED[layout], device=CPU, grad_clip=0.0
    )  # with it come its libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    make = optim.optimizer_factory({"type": "SGD", "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}, device=CPU)
    if sharded:
        with torch.device("meta"):
            model = MMDiT(**BIG)
        source = open_source(path, where="big", on_read=read.append)
        plan = plan_load(model, source)
        booster.prepare(model, make)
        load_pretrained_sharded(booster, source, plan.names, initial=missing)
    else:
        model = MMDiT(**BIG)
        load_pretrained(model, str(path), where="big", strict=True)
        booster.prepare(model, make)
    total = sum(shard.double().sum().item() for _, shard in booster.master_shards())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    facts = {"peak": peak, "read": sum(read), "sum": total}
    (folder / f"big_{layout}_{sharded}_{rank}.json").write_text(json.dumps(facts))


def missing(name: str) -> Tensor:
    raise KeyError(name)


def write_big(folder: Path) -> None:
    save_file({n: p.detach() for n, p in MMDiT(**BIG).named_parameters()}, folder / "big.safetensors")


def main(folder: Path) -> int:
    statuses = []
    for size, work in (
        (1, lambda rank: write_files(folder)),
        (1, lambda rank: write_big(folder)),
        (2, lambda rank: compare(rank, folder)),
        (2, lambda rank: build_without_asking(rank, folder)),
        *((2, partial(measure, folder=folder, layout=n, sharded=s)) for n in MEASURED for s in (True, False)),
    ):
        statuses += World(size, work, log=folder / "log.txt").join()
    print((folder / "log.txt").read_text())
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
