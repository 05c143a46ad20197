"""Trains tiny denoisers with ColossalAI's tensor and sequence parallelism and writes what came out, for the tests.

    torchrun --nproc_per_node 2 hybrid_cases.py FOLDER        (or plain python: one process, the reference)

Rank 0 writes ``world{N}.pt``: case -> facts. Checkpoints stay in FOLDER/saved, where later runs with other numbers of
processes read them; run 2, 4, then 1.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp2_cases import (
    CPU,
    Case,
    Problem,
    Trained,
    everywhere,
    manager_of,
    message_of,
    mmdit,
    optimizer_of,
    same,
    trains,
)
from torch import nn
from torch.distributed import distributed_c10d

from opensora_like import runtime
from opensora_like.checkpoint.manager import TrainState
from opensora_like.registry import BOOSTERS, build
from opensora_like.training.ema import EMA


def plugin(name: str, **config: Any) -> tuple[tuple[str, Any], ...]:
    """Options of a `Case`."""
    return (("plugin", name), ("plugin_config", config))


def case(problem: Problem, accumulation: int, options: tuple[tuple[str, Any], ...]) -> Case:
    return Case(problem, accumulation, options, "colossalai")


FUSED, SPLIT, ADAMW = Problem(), Problem("split", steps=5), Problem(optim="adamw")
WAN, FROZEN = Problem("wan", steps=4), Problem("frozen", steps=4)
LONG_TEXT, FEW = (Problem(data=d, steps=4) for d in ("long text", "few tokens"))
BF16 = Problem(dtype="bf16")
BF16_ADAMW = Problem(optim="adamw", dtype="bf16")
PROBLEMS = [FUSED, SPLIT, WAN, FROZEN, LONG_TEXT, FEW]  # in float32; bfloat16 is compared with it, too

SP = {"sp_size": 2, "enable_sequence_parallelism": True}
RING = SP | {"sequence_parallelism_mode": "ring_attn"}
# what the published stage 2 of Open-Sora has, with 2 in place of its 4 sequence ranks
STAGE2 = RING | {
    "tp_size": 1, "pp_size": 1, "static_graph": True, "zero_stage": 2, "reduce_bucket_size_in_m": 128,
    "overlap_allgather": False,
}  # fmt: skip

CASES: dict[int, list[Case]] = {
    2: [
        case(FUSED, 2, plugin("hybrid")),
        case(SPLIT, 2, plugin("hybrid", static_graph=True)),
        *(case(p, 2, plugin("hybrid", tp_size=2)) for p in (FUSED, SPLIT)),
        *(case(p, 1, plugin("hybrid", tp_size=2)) for p in (WAN, FROZEN)),
        *(case(SPLIT, 2, plugin("hybrid", **o)) for o in (SP, RING)),
        *(case(p, 1, plugin("hybrid", **o)) for p in (WAN, LONG_TEXT, FEW) for o in (SP, RING)),
        case(FUSED, 2, plugin("zero1-seq", sp_size=2)),
        case(FUSED, 1, plugin("zero2-seq", sp_size=2, sequence_parallelism_mode="ring_attn")),
        case(BF16, 2, plugin("hybrid")),
        case(BF16, 2, plugin("hybrid", tp_size=2)),
        case(BF16, 2, plugin("hybrid", tp_size=2, zero_stage=1)),
        case(BF16, 2, plugin("hybrid", **STAGE2)),
        case(BF16, 2, plugin("zero1-seq", sp_size=2)),
    ],
    4: [
        case(FUSED, 2, plugin("hybrid", tp_size=2)),
        case(SPLIT, 1, plugin("hybrid", **SP)),
        case(FUSED, 1, plugin("hybrid", tp_size=2, **SP)),
        case(SPLIT, 2, plugin("hybrid", tp_size=2, **RING)),
        case(FEW, 1, plugin("zero1-seq", sp_size=4, sequence_parallelism_mode="ring_attn")),
        case(BF16, 2, plugin("hybrid", tp_size=2, zero_stage=2)),
        case(BF16, 1, plugin("hybrid", tp_size=2, zero_stage=1, overlap_allgather=True, communication_dtype="fp32")),
        case(BF16, 1, plugin("hybrid", tp_size=2, **RING, zero_stage=2)),
    ],
}

# name -> how a checkpoint's run is laid out
LAYOUTS: dict[str, Case] = {
    "tp2": case(ADAMW, 1, plugin("hybrid", tp_size=2)),
    "tp2 zero1": case(BF16_ADAMW, 1, plugin("hybrid", tp_size=2, zero_stage=1)),
    "dp": case(ADAMW, 1, plugin("hybrid")),
    "stage2": case(BF16_ADAMW, 1, plugin("hybrid", **STAGE2)),
    "zero1-seq": case(ADAMW, 1, plugin("zero1-seq", sp_size=2)),
    "tp2 sp2": case(ADAMW, 1, plugin("hybrid", tp_size=2, **SP)),
    "tp2 bf16": case(BF16_ADAMW, 1, plugin("hybrid", tp_size=2)),
    "ddp": Case(ADAMW, booster="ddp"),
    "zero1": case(BF16_ADAMW, 1, plugin("zero1")),
    "fsdp2 tp2": Case(ADAMW, 1, (("tp_size", 2),)),
}
SAVED: dict[int, list[str]] = {
    2: ["tp2", "tp2 zero1", "stage2", "tp2 bf16", "fsdp2 tp2"],
    4: ["tp2 zero1", "tp2 sp2", "zero1-seq"],
    1: [],
}
LOADED: dict[int, list[tuple[int, str, str]]] = {  # (processes that saved, saved, read as)
    2: [
        (2, "tp2", "tp2"), (2, "tp2", "tp2 zero1"), (2, "tp2 zero1", "dp"), (2, "stage2", "tp2 zero1"),
        (2, "tp2 zero1", "tp2 zero1"), (2, "fsdp2 tp2", "tp2"), (2, "tp2", "fsdp2 tp2"), (2, "tp2 bf16", "zero1-seq"),
        (2, "tp2", "tp2 bf16"),
    ],
    4: [(2, "tp2", "tp2 sp2"), (2, "tp2 zero1", "tp2 zero1"), (2, "stage2", "tp2"), (2, "tp2", "stage2")],
    1: [(4, "tp2 zero1", "ddp"), (4, "tp2 sp2", "zero1"), (4, "zero1-seq", "ddp"), (2, "tp2", "ddp")],
}  # fmt: skip
SKIPPED = ["tp2", "tp2 zero1", "dp", "stage2", "zero1-seq", "tp2 bf16"]


@contextmanager
def groups_given_back() -> Iterator[None]:
    """Destroy the process groups that a run makes: each has a thread of gloo that never sleeps long."""
    before = set(distributed_c10d._world.pg_map)
    yield
    dist.barrier()
    for group in set(distributed_c10d._world.pg_map) - before:
        dist.destroy_process_group(group)


@groups_given_back()
def saves(folder: Path, layout: str) -> None:
    """A run of two steps, written as a checkpoint, and beside it what was in it."""
    run = Trained(LAYOUTS[layout])
    ema = EMA(run.booster, 0.5)
    for step in range(2):
        run.step(step)
        ema.update(step + 1)
    manager_of(run, folder, ema).save(TrainState(step=2))
    whole = run.whole(ema)
    loss, norm = run.step(2)
    if dist.get_rank() == 0:
        torch.save({"whole": whole, "loss": loss, "norm": norm}, folder / "truth.pt")
    dist.barrier()


@groups_given_back()
def loads(folder: Path, layout: str) -> dict[str, Any]:
    """A checkpoint of any layout, read into another that started from other weights."""
    truth = torch.load(folder / "truth.pt")
    run = Trained(LAYOUTS[layout], seed=1)
    with torch.no_grad():
        run.loss(0, run.booster.dp_rank, run.booster.dp_size)
    ema = EMA(run.booster, 0.5)
    manager_of(run, folder, ema).load(folder / "epoch0-global_step2")
    whole = run.whole(ema)
    exact = dist.get_rank() != 0 or same(whole, truth["whole"])
    loss, norm = run.step(2)
    return {"exact": everywhere(exact), "loss": abs(loss / truth["loss"] - 1), "norm": abs(norm / truth["norm"] - 1)}


@groups_given_back()
def skips_non_finite(layout: str) -> dict[str, Any]:
    """A step whose loss is infinite on the last rank only, between good ones."""
    run, clean = Trained(LAYOUTS[layout]), Trained(LAYOUTS[layout])
    run.step(0)
    clean.step(0)
    before = run.whole()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    _, norm = run.step(1, factor=float("inf") if is_last else 1.0)
    unchanged = everywhere(same(before, run.whole()))
    run.step(2)
    clean.step(2)
    return {"norm": norm, "unchanged": unchanged, "forgotten": everywhere(same(run.whole(), clean.whole()))}


@groups_given_back()
def fills_meta() -> dict[str, Any]:
    """A model on meta under tensor parallelism, filled through the views as a load does."""
    whole = Trained(LAYOUTS["tp2"])
    with torch.device("meta"):
        model = mmdit()
    empty = Trained(LAYOUTS["tp2"], model=model)
    shards = dict(whole.booster.master_shards())
    for name, shard in empty.booster.master_shards():
        shard.copy_(shards[name])
    empty.booster.refresh()
    return {"equal": everywhere(same(whole.whole(), empty.whole())), "losses": whole.step(0)[0] - empty.step(0)[0]}


def errors() -> dict[str, str]:
    """Messages of layouts that two processes, or a model of three heads, do not allow."""

    def make(name: str, **config: Any) -> Callable[[], Any]:
        section = {"type": "colossalai", "plugin": name, "plugin_config": config}
        return lambda: build(section, BOOSTERS, where="booster", device=CPU, dtype="fp32")

    def prepare(model: nn.Module, name: str, **config: Any) -> Callable[[], Any]:
        return lambda: make(name, **config)().prepare(model, optimizer_of("sgd"))

    return {
        "tp 3": message_of(make("hybrid", tp_size=3)),
        "tp 2 sp 2": message_of(make("hybrid", tp_size=2, **SP)),
        "seq 4": message_of(make("zero1-seq", sp_size=4)),
        "heads tp": message_of(prepare(mmdit(heads=3), "hybrid", tp_size=2)),
        "heads sp": message_of(prepare(mmdit(heads=3), "hybrid", **SP)),
        "heads seq": message_of(prepare(mmdit(heads=3), "zero1-seq", sp_size=2)),
        "heads ring": message_of(prepare(mmdit(heads=3), "hybrid", **RING)),
        "no plan": message_of(prepare(nn.Linear(2, 2), "hybrid", tp_size=2)),
    }


def main(folder: Path) -> None:
    process = runtime.start()
    world = process.world_size
    facts: dict[str, Any] = {}
    if world == 1:
        facts |= {f"reference {p.name}": trains(Case(p, booster="ddp")) for p in PROBLEMS}
    for c in CASES.get(world, []):
        with groups_given_back():
            facts[c.name] = trains(c)
    for name in SAVED[world]:
        saves(folder / "saved" / f"{world} {name}", name)
    for origin, saved, name in LOADED[world]:
        facts[f"{origin} {saved} -> {world} {name}"] = loads(folder / "saved" / f"{origin} {saved}", name)
    if world == 2:
        facts |= {f"skips {name}": skips_non_finite(name) for name in SKIPPED}
        facts["meta"] = fills_meta()
        facts["errors"] = errors()
    if process.is_main:
        torch.save(facts, folder / f"world{world}.pt")
    runtime.finish()


@functools.cache
def launch() -> tuple[dict[int, dict[str, Any]], str]:
    """Run everything once, with 2, 4 and 1 processes. Returns: number of processes -> case -> facts; what it said."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parents[1]}:{here}"}
        found, printed = {}, ""
        for world in (2, 4, 1):
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            command = [*(start if world > 1 else [sys.executable]), __file__, folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{world} processes: {done.stderr[-4000:]}"
            found[world] = torch.load(Path(folder) / f"world{world}.pt")
            printed += done.stdout + done.stderr
        return found, printed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # as booster_cases does
