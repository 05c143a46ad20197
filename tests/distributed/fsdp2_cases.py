"""Trains tiny denoisers in every layout that one set of processes allows and writes what came out, for the tests.

    torchrun --nproc_per_node 2 fsdp2_cases.py FOLDER        (or plain python: one process, the reference)

Rank 0 writes ``world{N}.pt``: case -> facts. Checkpoints stay in FOLDER/saved, where later runs with other numbers of
processes read them; run 2, 4, then 1.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp2_models import MODELS, build_model, data, mmdit
from torch import Tensor, nn

from opensora_like import runtime
from opensora_like.boosters import sequence_parallel
from opensora_like.boosters.base import Booster, OptimizerFactory
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.registry import BOOSTERS, build
from opensora_like.training.ema import EMA

STEPS, CLIP = 10, 0.3
CPU = torch.device("cpu")
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
WAN = Problem("wan", steps=4)
LONG_TEXT, FEW, SINGLE = (Problem(data=d, steps=4) for d in ("long text", "few tokens", "single"))
BF16 = Problem(dtype="bf16")
PROBLEMS = [FUSED, SPLIT, ADAMW, WAN, LONG_TEXT, FEW, SINGLE, BF16, Problem("frozen", steps=4)]

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
        *(Case(WAN, 1, o) for o in ((), (TP,), (SP,), (SP, RING))),
        *(Case(p, 1, o) for p in (LONG_TEXT, FEW, SINGLE) for o in ((SP,), (SP, RING))),
        *(Case(Problem("frozen", steps=4), 1, o) for o in ((), (TP,), (SP,))),
        Case(BF16),
        *(Case(SPLIT, 1, o, "ddp") for o in ((SP,), (SP, RING))),
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


class DDPWithSequence:
    """How another booster takes part: its own averaging over all ranks, and the model prepared first."""

    def __init__(self, *, sp_size: int, sequence_parallelism_mode: str = "all_to_all", **settings: Any) -> None:
        self._booster = build({"type": "ddp"}, BOOSTERS, where="booster", **settings)
        self._sequence = sequence_parallel.build_sequence_group(sp_size, sequence_parallelism_mode)
        self.dp_rank, self.dp_size = sequence_parallel.data_ranks(
            dist.get_rank(), dist.get_world_size(), sp_size=sp_size
        )

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        sequence_parallel.apply_sequence_parallelism(model, self._sequence)
        return self._booster.prepare(model, make_optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._booster, name)


class Trained:
    """A booster with its model, as a loop has it."""

    def __init__(self, case: Case, *, seed: int = 0, model: nn.Module | None = None) -> None:
        self.case, problem = case, case.problem
        settings = {"device": CPU, "dtype": problem.dtype, "grad_clip": CLIP}
        self.booster: Booster
        if case.booster == "ddp" and case.options:
            self.booster = DDPWithSequence(**dict(case.options), **settings)
        else:
            section = {"type": case.booster, **dict(case.options)}
            self.booster = build(section, BOOSTERS, where="booster", **settings)
        plain = build_model(problem.model, seed) if model is None else model
        self.model = self.booster.prepare(plain, optimizer_of(problem.optim))

    def loss(self, step: int, part: int, parts: int) -> Tensor:
        x, t, conditions, target = data(self.case.problem.model, self.case.problem.data, step)
        mine = lambda whole: whole.chunk(parts)[part]  # noqa: E731
        out = self.model(mine(x), mine(t), {name: mine(value) for name, value in conditions.items()})
        return (out.float() - mine(target)).square().mean()

    def step(self, step: int, *, factor: float = 1.0) -> tuple[float, float]:
        """One update. Returns: loss over the global batch, gradient norm."""
        booster, accumulation = self.booster, self.case.accumulation
        total = torch.zeros(())
        for micro in range(accumulation):
            with booster.micro_batch(last=micro == accumulation - 1):
                part = micro * booster.dp_size + booster.dp_rank
                loss = self.loss(step, part, accumulation * booster.dp_size) * factor
                booster.backward(loss / accumulation)
            total += loss.detach() / accumulation
        return runtime.mean_over_ranks(total).item(), booster.step()

    def whole(self, ema: EMA | None = None) -> dict[str, dict[str, Tensor]]:
        """Kind -> name -> whole tensor, on rank 0."""
        kinds = {"master": dict(self.booster.master_shards()), **self.booster.optimizer_shards()}
        if ema is not None:
            kinds["ema"] = ema.shards
        return {kind: self.booster.gather(shards) for kind, shards in kinds.items()}


def trains(case: Case) -> dict[str, Any]:
    run = Trained(case)
    start = run.whole()["master"]
    steps = [run.step(step) for step in range(case.problem.steps)]
    return {
        "start": start,
        "losses": [loss for loss, _ in steps],
        "norms": [norm for _, norm in steps],
        "weights": run.whole()["master"],
    }


def everywhere(claim: bool) -> bool:
    """Whether all ranks say so."""
    votes = torch.tensor([int(claim)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[kind].keys() == b[kind].keys() and all(torch.equal(a[kind][n], b[kind][n]) for n in a[kind]) for kind in a
    )


def skips_non_finite(options: Options) -> dict[str, Any]:
    """A step whose loss is infinite on the last rank only, between good ones."""
    run, clean = Trained(Case(ADAMW, 1, options)), Trained(Case(ADAMW, 1, options))
    run.step(0)
    clean.step(0)
    before = run.whole()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    _, norm = run.step(1, factor=float("inf") if is_last else 1.0)
    unchanged = everywhere(same(before, run.whole()))
    run.step(2)
    clean.step(2)
    return {"norm": norm, "unchanged": unchanged, "forgotten": everywhere(same(run.whole(), clean.whole()))}


def counts_communication() -> dict[str, int]:
    """Reductions of gradients in the first and in the last micro-batch of a step."""
    from torch.distributed.tensor.debug import CommDebugMode

    run = Trained(Case(FUSED))
    found = {}
    for last in (False, True):
        with CommDebugMode() as seen, run.booster.micro_batch(last=last):
            run.booster.backward(run.loss(0, 0, 2))
        found[str(last)] = sum(n for op, n in seen.get_comm_counts().items() if "reduce_scatter" in str(op))
    run.booster.step()
    return found


def manager_of(run: Trained, folder: Path, ema: EMA) -> CheckpointManager:
    return CheckpointManager(folder, run.booster, ema=ema.shards, config_text="", keep_n_latest=-1, order={}, about={})


def name_of(options: Options) -> str:
    return " ".join(f"{key}={value}" for key, value in options) or "plain"


def saves(folder: Path, options: Options) -> None:
    """A run of two steps, written as a checkpoint, and beside it what was in it."""
    run = Trained(Case(ADAMW, 1, options))
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


def loads(folder: Path, case: Case, *, on_meta: bool = False) -> dict[str, Any]:
    """A checkpoint of any layout, read into another; the model has been used before, as a validation would."""
    truth = torch.load(folder / "truth.pt")
    model = None
    if on_meta:
        with torch.device("meta"):
            model = MODELS[case.problem.model]()
    run = Trained(case, seed=1, model=model)
    with torch.no_grad():
        run.loss(0, run.booster.dp_rank, run.booster.dp_size)
    ema = EMA(run.booster, 0.5)
    manager_of(run, folder, ema).load(folder / "epoch0-global_step2")
    whole = run.whole(ema)
    exact = dist.get_rank() != 0 or same(whole, truth["whole"])
    loss, norm = run.step(2)
    return {"exact": everywhere(exact), "loss": abs(loss / truth["loss"] - 1), "norm": abs(norm / truth["norm"] - 1)}


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as problem:
        return str(problem)
    return ""


def errors() -> dict[str, str]:
    """Messages of layouts that two processes, or a model of three heads, do not allow."""

    def make(**options: Any) -> Callable[[], Any]:
        return lambda: build({"type": "fsdp2", **options}, BOOSTERS, where="booster", device=CPU)

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
    }


def main(folder: Path) -> None:
    process = runtime.start()
    world = process.world_size
    facts: dict[str, Any] = {}
    if world == 1:
        facts |= {f"reference {p.name}": trains(Case(p, booster="ddp")) for p in PROBLEMS}
    facts |= {case.name: trains(case) for case in CASES[world]}
    for options in SAVED[world]:
        saves(folder / "saved" / f"{world} {name_of(options)}", options)
    for origin, saved, options in LOADED[world]:
        folder_of = folder / "saved" / f"{origin} {name_of(saved)}"
        facts[f"{origin} {name_of(saved)} -> {world} {name_of(options)}"] = loads(folder_of, Case(ADAMW, 1, options))
    if world == 1:
        facts["2 tp_size=2 -> 1 ddp"] = loads(folder / "saved/2 tp_size=2", Case(ADAMW, booster="ddp"))
    if world == 2:
        for options in ((), (TP,), (SP,), (("cpu_offload", True),)):
            facts[f"skips {name_of(options)}"] = skips_non_finite(options)
            saved = folder / "saved/2 plain"
            facts[f"meta {name_of(options)}"] = loads(saved, Case(ADAMW, 1, options), on_meta=True)
        facts["communication"] = counts_communication()
        facts["errors"] = errors()
    if process.is_main:
        torch.save(facts, folder / f"world{world}.pt")
    runtime.finish()


@functools.cache
def launch() -> dict[int, dict[str, Any]]:
    """Run everything once, with 2, 4 and 1 processes. Returns: number of processes -> case -> facts."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        found = {}
        for world in (2, 4, 1):
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            command = [*(start if world > 1 else [sys.executable]), str(Path(__file__)), folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{world} processes: {done.stderr[-4000:]}"
            found[world] = torch.load(Path(folder) / f"world{world}.pt")
        return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
