"""Trains tiny denoisers in every layout that one set of processes allows and writes what came out, for the tests.

    torchrun --nproc_per_node 2 fsdp2_cases.py FOLDER        (or plain python: one process, the reference)

Rank 0 writes ``world{N}.pt``: case -> facts. Checkpoints stay in FOLDER/saved, where later runs with other numbers of
processes read them; run 2, 4, then 1.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsdp2_models import MODELS, build_model, data, mmdit
from parity_harness import (
    CPU,
    LossOf,
    TrainingRun,
    groups_given_back,
    launch,
    loads,
    message_of,
    saves,
    skips_non_finite,
)
from torch import Tensor, nn

from opensora_like import runtime
from opensora_like.boosters.base import OptimizerFactory
from opensora_like.registry import BOOSTERS, build

STEPS, CLIP = 10, 0.3
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Problem:
    """What is trained on what; every layout of it has to give the same numbers.

    Args:
        model, data: names in `fsdp2_models`.
    """

    model: str = "fused"
    data: str = "odd"
    optim: str = "sgd"
    dtype: str = "fp32"
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.model} {self.data} {self.optim} {self.dtype} {self.steps}"


@dataclass(frozen=True)
class Case:
    """A problem in a layout."""

    problem: Problem = field(default_factory=Problem)
    accumulation: int = 1
    options: Options = ()
    booster: str = "fsdp2"

    @property
    def name(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.booster}{extra} x{self.accumulation} | {self.problem.name}"


TP, SP, HSDP = ("tp_size", 2), ("sp_size", 2), ("dp_replicate_size", 2)
RING = ("sequence_parallelism_mode", "ring")
FUSED, SPLIT, ADAMW = Problem(), Problem("split"), Problem(optim="adamw")
WAN, TI2V, SPEECH = (Problem(name, steps=4) for name in ("wan", "ti2v", "speech"))
LONG_TEXT, FEW, SINGLE = (Problem(data=d, steps=4) for d in ("long text", "few tokens", "single"))
BF16 = Problem(dtype="bf16")
PROBLEMS = [FUSED, SPLIT, ADAMW, WAN, TI2V, SPEECH, LONG_TEXT, FEW, SINGLE, BF16, Problem("frozen", steps=4)]

CASES: dict[int, list[Case]] = {
    1: [Case(p) for p in (FUSED, SPLIT)] + [Case(ADAMW, 2, (("cpu_offload", True),)), Case(BF16)],
    2: [
        Case(FUSED),
        Case(FUSED, 2),
        Case(SPLIT, 1),
        Case(ADAMW, 2),
        Case(FUSED, 2, (("reshard_after_forward", False),)),
        Case(FUSED, 2, (("cpu_offload", True),)),
        Case(ADAMW, 1, (("cpu_offload", True), ("reshard_after_forward", False))),
        Case(FUSED, 2, (HSDP,)),
        *(Case(p, 2, (TP,)) for p in (FUSED, SPLIT, ADAMW, BF16)),
        *(Case(p, 2, (SP,)) for p in (FUSED, SPLIT, ADAMW, BF16)),
        *(Case(p, 2, (SP, RING)) for p in (FUSED, SPLIT, BF16)),
        *(Case(p, 1, o) for p in (WAN, SPEECH) for o in ((), (TP,), (SP,), (SP, RING))),
        *(Case(TI2V, 1, o) for o in ((TP,), (SP,), (SP, RING))),
        *(Case(p, 1, o) for p in (LONG_TEXT, FEW, SINGLE) for o in ((SP,), (SP, RING))),
        *(Case(Problem("frozen", steps=4), 1, o) for o in ((), (TP,), (SP,))),
        Case(BF16),
        *(Case(p, 2, o, "ddp") for p in (SPLIT, BF16) for o in ((SP,), (SP, RING))),
        *(Case(p, 1, o, "ddp") for p in (WAN, LONG_TEXT, FEW, SINGLE) for o in ((SP,), (SP, RING))),
    ],
    4: [
        Case(FUSED, 2),
        Case(SPLIT, 2, (HSDP,)),
        Case(FUSED, 2, (TP,)),
        Case(SPLIT, 1, (TP, HSDP)),
        Case(FUSED, 1, (SP,)),
        Case(SPLIT, 2, (SP, RING)),
        Case(FUSED, 1, (TP, SP)),
        Case(FUSED, 1, (TP, SP, RING)),
        Case(FEW, 1, (("sp_size", 4),)),
        Case(FEW, 1, (("sp_size", 4), RING)),
        Case(SPLIT, 2, (SP,), "ddp"),
        Case(FEW, 1, (("sp_size", 4), RING), "ddp"),
    ],
}
PLAIN: Options = ()
SAVED: dict[int, list[Options]] = {2: [PLAIN, (TP,), (SP,), (HSDP,)], 4: [(TP,), (TP, HSDP)], 1: [PLAIN]}
# (processes and layout that saved, layout that loads, with the key's number of processes)
LOADED: dict[int, list[tuple[int, Options, Options]]] = {
    2: [
        (2, PLAIN, (TP,)),
        (2, (TP,), PLAIN),
        (2, (TP,), (SP,)),
        (2, (SP,), (HSDP,)),
        (2, (HSDP,), (TP,)),
        (2, (TP,), (TP,)),
    ],
    4: [(2, PLAIN, (TP,)), (2, (TP,), (TP, HSDP)), (2, (SP,), (HSDP,)), (2, (TP,), PLAIN)],
    1: [(world, options, PLAIN) for world in (2, 4, 1) for options in SAVED[world]],
}


def optimizer_of(kind: str) -> OptimizerFactory:
    if kind == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    # a gradient that is zero but for rounding must not become a step of full size
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-5)


def loss_of(problem: Problem) -> LossOf:
    """On one of equal parts of its global batch."""

    def loss(model: nn.Module, step: int, part: int, parts: int) -> Tensor:
        x, t, conditions, target = data(problem.model, problem.data, step)
        mine = lambda whole: whole.chunk(parts)[part]  # noqa: E731
        out = model(mine(x), mine(t), {name: mine(value) for name, value in conditions.items()})
        return (out.float() - mine(target)).square().mean()

    return loss


def run_of(case: Case, *, seed: int = 0, model: nn.Module | None = None) -> TrainingRun:
    """Ready to step."""
    problem = case.problem
    return TrainingRun(
        {"type": case.booster, **dict(case.options)},
        dtype=problem.dtype,
        grad_clip=CLIP,
        model=build_model(problem.model, seed) if model is None else model,
        optimizer=optimizer_of(problem.optim),
        loss_of=loss_of(problem),
        accumulation=case.accumulation,
    )


def trains(case: Case) -> dict[str, Any]:
    run = run_of(case)
    start = run.whole()["master"]
    steps = [run.step(step) for step in range(case.problem.steps)]
    return {
        "start": start,
        "losses": [loss for loss, _ in steps],
        "norms": [norm for _, norm in steps],
        "weights": run.whole()["master"],
    }


def counts_communication() -> dict[str, int]:
    """Reductions of gradients in the first and in the last micro-batch of a step."""
    from torch.distributed.tensor.debug import CommDebugMode

    run = run_of(Case(FUSED))
    found = {}
    for last in (False, True):
        with CommDebugMode() as seen, run.booster.micro_batch(last=last):
            run.booster.backward(loss_of(FUSED)(run.model, 0, 0, 2))
        found[str(last)] = sum(n for op, n in seen.get_comm_counts().items() if "reduce_scatter" in str(op))
    run.booster.step()
    return found


def name_of(options: Options) -> str:
    return " ".join(f"{key}={value}" for key, value in options) or "plain"


def moved(folder: Path, case: Case, *, on_meta: bool = False) -> dict[str, Any]:
    """See `loads`."""
    model = None
    if on_meta:
        with torch.device("meta"):
            model = MODELS[case.problem.model]()
    return loads(run_of(case, seed=1, model=model), folder)


def errors() -> dict[str, str]:
    """Messages of layouts that two processes, or a model of three heads, do not allow."""

    def make(**options: Any) -> Callable[[], Any]:
        return lambda: build({"type": "fsdp2"} | options, BOOSTERS, where="booster", device=CPU)

    def prepare(model: nn.Module, **options: Any) -> Callable[[], Any]:
        return lambda: make(**options)().prepare(model, optimizer_of("sgd"))

    return {
        "tp 3": message_of(make(tp_size=3)),
        "tp 2 sp 2": message_of(make(tp_size=2, sp_size=2)),
        "replicas 0": message_of(make(dp_replicate_size=0)),
        "mode": message_of(make(sp_size=2, sequence_parallelism_mode="rings")),
        "reduce_dtype": message_of(make(reduce_dtype="fp16")),
        "heads tp": message_of(prepare(mmdit(heads=3), tp_size=2)),
        "heads sp": message_of(prepare(mmdit(heads=3), sp_size=2)),
        "odd width": message_of(prepare(mmdit(heads=2, mlp_ratio=1.05), tp_size=2)),
        "heads ring": message_of(prepare(mmdit(heads=3), sp_size=2, sequence_parallelism_mode="ring")),
        "no plan": message_of(prepare(nn.Linear(2, 2))),
        "ddp sp 4": message_of(make(type="ddp", sp_size=4)),
        "ddp heads sp": message_of(prepare(mmdit(heads=3), type="ddp", sp_size=2)),
        "ddp heads ring": message_of(prepare(mmdit(heads=3), type="ddp", sp_size=2, sequence_parallelism_mode="ring")),
        "ddp no plan": message_of(prepare(nn.Linear(2, 2), type="ddp", sp_size=2)),
    }


def main(folder: Path) -> None:
    process = runtime.start()
    world = process.world_size
    facts: dict[str, Any] = {}

    def note(name: str, action: Callable[[], Any]) -> None:
        with groups_given_back():
            facts[name] = action()

    for problem in PROBLEMS if world == 1 else ():
        note(f"reference {problem.name}", partial(trains, Case(problem, booster="ddp")))
    for case in CASES[world]:
        note(case.name, partial(trains, case))
    for options in SAVED[world]:
        with groups_given_back():
            saves(run_of(Case(ADAMW, 1, options)), folder / "saved" / f"{world} {name_of(options)}")
    for origin, saved, options in LOADED[world]:
        name, case = f"{origin} {name_of(saved)}", Case(ADAMW, 1, options)
        note(f"{name} -> {world} {name_of(options)}", partial(moved, folder / "saved" / name, case))
    if world == 1:
        note("2 tp_size=2 -> 1 ddp", partial(moved, folder / "saved/2 tp_size=2", Case(ADAMW, booster="ddp")))
    if world == 2:
        for options in ((), (TP,), (SP,), (("cpu_offload", True),)):
            case = Case(ADAMW, 1, options)
            note(f"skips {name_of(options)}", lambda case=case: skips_non_finite(run_of(case), run_of(case)))
            note(f"meta {name_of(options)}", partial(moved, folder / "saved/2 plain", case, on_meta=True))
        ddp = Case(ADAMW, 1, (SP,), "ddp")
        note("meta ddp", partial(moved, folder / "saved/2 tp_size=2", ddp, on_meta=True))
        note("communication", counts_communication)
        note("errors", errors)
    if process.is_main:
        torch.save(facts, folder / f"world{world}.pt")
    runtime.finish()


@functools.cache
def results() -> dict[int, dict[str, Any]]:
    """Run everything once, with 2, 4 and 1 processes. Returns: number of processes -> case -> facts."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for world in (2, 4, 1):
            launch(Path(__file__), folder, world=world)
            found[world] = torch.load(Path(folder) / f"world{world}.pt")
        return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # as booster_cases does
