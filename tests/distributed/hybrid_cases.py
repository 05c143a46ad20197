"""Trains tiny denoisers with ColossalAI's tensor and sequence parallelism and writes what came out, for the tests.

    torchrun --nproc_per_node 2 hybrid_cases.py FOLDER        (or plain python: one process, the reference)

Rank 0 writes ``world{N}.pt``: case -> facts. Checkpoints stay in FOLDER/saved, where later runs with other numbers of
processes read them; run 2, 4, then 1.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsdp2_cases import Case, Problem, loss_of, mmdit, optimizer_of, run_of, trains
from parity_harness import (
    CPU,
    everywhere,
    groups_given_back,
    launch,
    loads,
    message_of,
    same,
    saves,
    skips_non_finite,
)
from torch import nn

from opensora_like import runtime
from opensora_like.registry import BOOSTERS, build


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
SPLIT_GATHER = {"tp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "split_gather"}
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
        *(case(p, 2, plugin("hybrid", **SPLIT_GATHER)) for p in (FUSED, SPLIT)),
        *(case(p, 1, plugin("hybrid", **SPLIT_GATHER)) for p in (WAN, FROZEN, LONG_TEXT)),
        case(FUSED, 2, plugin("zero1-seq", sp_size=2)),
        case(FUSED, 1, plugin("zero2-seq", sp_size=2, sequence_parallelism_mode="ring_attn")),
        case(BF16, 2, plugin("hybrid")),
        case(BF16, 2, plugin("hybrid", tp_size=2)),
        case(BF16, 2, plugin("hybrid", tp_size=2, zero_stage=1)),
        case(BF16, 2, plugin("hybrid", **SPLIT_GATHER)),
        case(BF16, 2, plugin("hybrid", **STAGE2)),
        case(BF16, 2, plugin("zero1-seq", sp_size=2)),
    ],
    4: [
        case(FUSED, 2, plugin("hybrid", tp_size=2)),
        case(SPLIT, 1, plugin("hybrid", **SP)),
        case(FUSED, 1, plugin("hybrid", tp_size=2, **SP)),
        case(SPLIT, 2, plugin("hybrid", tp_size=2, **RING)),
        case(FUSED, 2, plugin("hybrid", **SPLIT_GATHER)),
        case(FEW, 1, plugin("hybrid", **(SPLIT_GATHER | {"tp_size": 4}))),
        case(FEW, 1, plugin("zero1-seq", sp_size=4, sequence_parallelism_mode="ring_attn")),
        case(BF16, 2, plugin("hybrid", tp_size=2, zero_stage=2)),
        case(BF16, 1, plugin("hybrid", tp_size=2, zero_stage=1, overlap_allgather=True, communication_dtype="fp32")),
        case(BF16, 1, plugin("hybrid", tp_size=2, **RING, zero_stage=2)),
        case(BF16, 1, plugin("hybrid", **SPLIT_GATHER, zero_stage=2)),
    ],
}

# name -> how a checkpoint's run is laid out
LAYOUTS: dict[str, Case] = {
    "tp2": case(ADAMW, 1, plugin("hybrid", tp_size=2)),
    "tp2 zero1": case(BF16_ADAMW, 1, plugin("hybrid", tp_size=2, zero_stage=1)),
    "split_gather zero1": case(BF16_ADAMW, 1, plugin("hybrid", zero_stage=1, **SPLIT_GATHER)),
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
        (2, "tp2", "tp2 bf16"), (2, "tp2 zero1", "split_gather zero1"),
    ],
    4: [
        (2, "tp2", "tp2 sp2"), (2, "tp2 zero1", "tp2 zero1"), (2, "stage2", "tp2"), (2, "tp2", "stage2"),
        (2, "stage2", "split_gather zero1"),
    ],
    1: [(4, "tp2 zero1", "ddp"), (4, "tp2 sp2", "zero1"), (4, "zero1-seq", "ddp"), (2, "tp2", "ddp")],
}  # fmt: skip
SKIPPED = ["tp2", "tp2 zero1", "split_gather zero1", "dp", "stage2", "zero1-seq", "tp2 bf16"]


@groups_given_back()
def fills_meta() -> dict[str, Any]:
    """A model on meta under tensor parallelism, filled through the views as a load does."""
    whole = run_of(LAYOUTS["tp2"])
    with torch.device("meta"):
        model = mmdit()
    empty = run_of(LAYOUTS["tp2"], model=model)
    shards = dict(whole.booster.master_shards())
    for name, shard in empty.booster.master_shards():
        shard.copy_(shards[name])
    empty.booster.refresh()
    return {"equal": everywhere(same(whole.whole(), empty.whole())), "losses": whole.step(0)[0] - empty.step(0)[0]}


@groups_given_back()
def kept_bytes(**config: Any) -> int:
    """What a forward keeps for its backward, but for weights."""
    run, kept = run_of(case(FUSED, 1, plugin("hybrid", **config))), {}
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(FUSED)(run.model, 0, run.booster.dp_rank, run.booster.dp_size)
    loss.backward()
    return sum(kept.values())


def without_streams() -> nn.Module:
    """A model whose plan says nothing of tokens."""
    model = mmdit()
    plan = dataclasses.replace(model.parallel_plan(), token_streams={})
    model.parallel_plan = lambda: plan
    return model


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
        "no streams": message_of(prepare(without_streams(), "hybrid", **SPLIT_GATHER)),
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
        with groups_given_back():
            saves(run_of(LAYOUTS[name]), folder / "saved" / f"{world} {name}")
    for origin, saved, name in LOADED[world]:
        with groups_given_back():
            found = loads(run_of(LAYOUTS[name], seed=1), folder / "saved" / f"{origin} {saved}")
        facts[f"{origin} {saved} -> {world} {name}"] = found
    if world == 2:
        for name in SKIPPED:
            with groups_given_back():
                facts[f"skips {name}"] = skips_non_finite(run_of(LAYOUTS[name]), run_of(LAYOUTS[name]))
        facts["kept"] = {"tp2": kept_bytes(tp_size=2), "split_gather": kept_bytes(**SPLIT_GATHER)}
        facts["meta"] = fills_meta()
        facts["errors"] = errors()
    if process.is_main:
        torch.save(facts, folder / f"world{world}.pt")
    runtime.finish()


@functools.cache
def results() -> tuple[dict[int, dict[str, Any]], str]:
    """Run everything once, with 2, 4 and 1 processes. Returns: number of processes -> case -> facts; what it said."""
    with tempfile.TemporaryDirectory() as folder:
        found, printed = {}, ""
        for world in (2, 4, 1):
            printed += launch(Path(__file__), folder, world=world)
            found[world] = torch.load(Path(folder) / f"world{world}.pt")
        return found, printed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # as booster_cases does
