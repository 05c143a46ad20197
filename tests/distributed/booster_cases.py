"""Trains a tiny model with every booster in one set of processes and writes what came out, for the tests to compare.

    torchrun --nproc_per_node 2 booster_cases.py FOLDER        (or plain python: one process)

Rank 0 writes ``world{N}.pt``: case -> facts. With two processes each rank leaves its shards in FOLDER/shards, which
a later run with one process reads.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parity_harness import CPU, everywhere, same_on_all_ranks, same_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_like import runtime
from opensora_like.boosters.base import Booster, OptimizerFactory
from opensora_like.registry import BOOSTERS, build

STEPS, SAMPLES, TOKENS, WIDTH = 10, 8, 5, 12


@dataclass(frozen=True)
class Case:
    """One training run."""

    booster: str  # "ddp", "zero1", "zero2"
    dtype: str = "fp32"
    optim: str = "sgd"
    accumulation: int = 1
    grad_clip: float = 0.0
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.options)
        clip = f" clip{self.grad_clip}" if self.grad_clip else ""
        return f"{self.booster} {self.dtype} {self.optim} x{self.accumulation}{clip}{extra}"


NAMES = ("ddp", "zero1", "zero2")
PLAIN = [Case(b, d, o, a) for b in NAMES for d in ("fp32", "bf16") for o in ("sgd", "adamw") for a in (1, 2)]
CLIPPED = [Case(b, d, "sgd", 2, grad_clip=0.05) for b in NAMES for d in ("fp32", "bf16")]
WITH_OPTIONS = [
    Case("zero2", options=(("overlap_allgather", True),)),
    Case("zero2", options=(("cpu_offload", True), ("reduce_bucket_size_in_m", 1))),
    Case("zero1", options=(("communication_dtype", "fp32"), ("overlap_communication", False))),
]
RESUMED = [Case(b, d, o, 2, grad_clip=0.5) for b in NAMES for d, o in (("fp32", "sgd"), ("bf16", "adamw"))]


class Tiny(nn.Module):
    """One transformer block; sizes that two ranks cannot share evenly, a frozen and an unused parameter, a table.

    The projections of attention have no bias: the gradient of a key's bias is zero but for rounding, and AdamW
    would turn that noise into steps of full size.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 13), nn.GELU(), nn.Linear(13, WIDTH))
        self.head = nn.Linear(WIDTH, 3)
        self.frozen = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))
        self.only_for_large = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.linspace(0, 1, TOKENS)[:, None].sin())

    def forward(self, x: Tensor, *, large: bool = True) -> Tensor:
        x = self.embed(x.to(self.embed.weight.dtype))
        x = x + self.table.to(x.dtype) * self.frozen.to(x.dtype)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = self.head(x + self.mlp(x))
        return x + self.only_for_large.to(x.dtype) if large else x


def data(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs [SAMPLES, TOKENS, 7], targets [SAMPLES, TOKENS, 3]."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(SAMPLES, TOKENS, 7, generator=generator)
    return x, torch.randn(SAMPLES, TOKENS, 3, generator=generator)


def parts(step: int, accumulation: int, world_size: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The global batch of a step as micro-batch -> rank -> (inputs, targets)."""
    x, y = data(step)
    count = accumulation * world_size
    pieces = list(zip(x.chunk(count), y.chunk(count), strict=True))
    return [pieces[i : i + world_size] for i in range(0, count, world_size)]


def loss_of(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def optimizer_of(kind: str) -> OptimizerFactory:
    if kind == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def booster_of(case: Case) -> Booster:
    options = dict(case.options)
    if case.booster == "ddp":
        section = {"type": "ddp", "find_unused_parameters": True}
    else:
        section = {"type": "colossalai", "plugin": case.booster, "plugin_config": options}
    return build(section, BOOSTERS, where="booster", device=CPU, dtype=case.dtype, grad_clip=case.grad_clip)


class Trained:
    """A booster with its model, as a loop has it."""

    def __init__(self, case: Case, *, seed: int = 0) -> None:
        self.case, self.booster, self.plain = case, booster_of(case), Tiny(seed)
        self.model = self.booster.prepare(self.plain, optimizer_of(case.optim))

    def step(self, step: int, *, bad_rank: int | None = None) -> float:
        """One update on this rank's share of the global batch; inf goes into the data of `bad_rank`."""
        case, booster = self.case, self.booster
        for i, micro in enumerate(parts(step, case.accumulation, booster.dp_size)):
            x, y = micro[booster.dp_rank]
            if bad_rank == booster.dp_rank:
                x = x.clone().fill_(float("inf"))
            with booster.micro_batch(last=i == case.accumulation - 1):
                booster.backward(loss_of(self.model(x), y) / case.accumulation)
        return booster.step()

    def steps(self, first: int, last: int) -> list[float]:
        return [self.step(step) for step in range(first, last)]

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything this rank holds: masters, optimizer state, working weights."""
        kept = {f"master/{n}": t.clone() for n, t in self.booster.master_shards()}
        for kind, tensors in self.booster.optimizer_shards().items():
            kept |= {f"{kind}/{n}": t.clone() for n, t in tensors.items()}
        return kept | {f"working/{n}": t.detach().clone() for n, t in self.plain.named_parameters()}

    def masters(self) -> dict[str, Tensor]:
        """Whole masters on rank 0."""
        return self.booster.gather(dict(self.booster.master_shards()))

    def write(self, folder: Path) -> None:
        """This rank's shards and where they belong, as one file."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t for n, t in self.snapshot().items() if not n.startswith("working/")}
        places = {f"range/{n}": torch.tensor([r.start, r.stop]) for n, r in self.booster.ranges().items()}
        save_file(tensors | places, folder / f"rank{self.booster.dp_rank}.safetensors")
        dist.barrier()

    def read(self, folder: Path) -> None:
        """This rank's ranges out of the files of any number of ranks."""
        files = [load_file(path) for path in sorted(folder.glob("rank*.safetensors"))]
        shards = {f"master/{n}": t for n, t in self.booster.master_shards()}
        for kind, tensors in self.booster.optimizer_shards().items():
            shards |= {f"{kind}/{n}": t for n, t in tensors.items()}
        for key, shard in shards.items():
            if shard.ndim == 0:
                shard.copy_(files[0][key])
                continue
            name = key.split("/", 1)[1]
            _, start, stop = self.booster.ranges()[name]
            for file in files:
                first, last = file[f"range/{name}"].tolist()
                low, high = max(start, first), min(stop, last)
                if low < high:
                    shard[low - start : high - start] = file[key][low - first : high - first]
        self.booster.refresh()
        dist.barrier()


def trains(case: Case) -> dict[str, Any]:
    """Norms and final masters, and that the ranks agree on working weights."""
    run = Trained(case)
    start = run.masters()
    norms = run.steps(0, STEPS)
    masters = run.masters()
    if dict(case.options).get("overlap_allgather"):
        run.model(data(0)[0])  # the weights arrive with it
    return {
        "start": start,
        "norms": norms,
        "masters": masters,
        "ranks_agree": same_on_all_ranks(run.plain.parameters()),
        "frozen_kept": torch.equal(run.plain.frozen.float(), Tiny(0).frozen.to(run.plain.frozen.dtype).float()),
        "table_kept": torch.equal(run.plain.table, Tiny(0).table),
    }


def skips_non_finite(case: Case) -> dict[str, Any]:
    """A step with inf on the last rank, between good steps: what it returns, and what it leaves."""
    run, clean = Trained(case), Trained(case)
    run.steps(0, 2)
    clean.steps(0, 2)
    before = run.snapshot()
    norm = run.step(2, bad_rank=run.booster.dp_size - 1)
    unchanged = everywhere(same_tensors(before, run.snapshot()))
    run.step(3)
    clean.step(3)
    return {
        "norm": norm,
        "unchanged": unchanged,
        "forgotten": everywhere(same_tensors(run.snapshot(), clean.snapshot())),
    }


def resumes(case: Case, folder: Path) -> dict[str, Any]:
    """Half a run, written, read into another model, and finished; against the whole run."""
    whole, first, second = Trained(case), Trained(case), Trained(case, seed=1)
    norms = whole.steps(0, STEPS)
    first.booster.optimizer_shards()  # made before the first step: must change nothing
    halves = first.steps(0, STEPS // 2)
    first.write(folder)
    second.read(folder)
    restored = everywhere(same_tensors(first.snapshot(), _with_frozen(second, first)))
    halves += second.steps(STEPS // 2, STEPS)
    state = first.booster.optimizer_shards()
    return {
        "restored": restored,
        "norms_equal": norms == halves,
        "equal": everywhere(same_tensors(whole.snapshot(), _with_frozen(second, whole))),
        "masters": first.masters(),
        "state": {kind: first.booster.gather(tensors) for kind, tensors in state.items()},
        "final": whole.masters(),
    }


def _with_frozen(run: Trained, other: Trained) -> dict[str, Tensor]:
    """The snapshot of `run`, with the frozen weight of `other`: a checkpoint does not hold it."""
    run.plain.frozen.data.copy_(other.plain.frozen)
    return run.snapshot()


def reads_other_world(case: Case, folder: Path) -> dict[str, Any]:
    """What two ranks wrote, read by one, and the run finished."""
    run = Trained(case, seed=1)
    run.plain.frozen.data.copy_(Tiny(0).frozen)
    run.read(folder)
    masters, state = run.masters(), run.booster.optimizer_shards()
    whole = {kind: run.booster.gather(tensors) for kind, tensors in state.items()}
    run.steps(STEPS // 2, STEPS)
    return {"masters": masters, "state": whole, "final": run.masters()}


def partly_used() -> dict[str, Any]:
    """DDP where one rank leaves a parameter out of its loss."""
    run = Trained(Case("ddp"))
    for step in range(STEPS):
        x, y = parts(step, 1, run.booster.dp_size)[0][run.booster.dp_rank]
        with run.booster.micro_batch(last=True):
            run.booster.backward(loss_of(run.model(x, large=run.booster.dp_rank == 0), y))
        run.booster.step()
    return {"masters": run.masters()}


def fills_meta(case: Case) -> dict[str, Any]:
    """A model on meta, filled through the views as a load does."""
    booster = booster_of(case)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    called = booster.prepare(model, optimizer_of("sgd"))
    for name, shard in booster.master_shards():
        shard.copy_(torch.arange(*booster.ranges()[name][1:]) / 8)
    booster.refresh()
    expected = [torch.arange(p.numel()).reshape(p.shape) / 8 for p in model.parameters()]
    filled = all(torch.equal(p.float(), e) for p, e in zip(model.parameters(), expected, strict=True))
    dtype = next(model.parameters()).dtype
    return {"filled": everywhere(filled), "finite": bool(called(torch.ones(2, 3, dtype=dtype)).isfinite().all())}


def main(folder: Path) -> None:
    process = runtime.start()
    facts: dict[str, Any] = {}
    for case in PLAIN + CLIPPED + WITH_OPTIONS:
        facts[f"trains {case.name}"] = trains(case)
    for booster in NAMES:
        facts[f"meta {booster}"] = fills_meta(Case(booster, "bf16"))
        for dtype in ("fp32", "bf16"):
            case = Case(booster, dtype, "adamw", 2, grad_clip=0.05)
            facts[f"skips {booster} {dtype}"] = skips_non_finite(case)
    for case in RESUMED:
        shards = folder / "shards" / case.name.replace(" ", "_")
        if process.world_size == 1 and shards.is_dir():
            facts[f"reads {case.name}"] = reads_other_world(case, shards)
        own = shards if process.world_size > 1 else shards.with_name(f"{shards.name}_alone")
        facts[f"resumes {case.name}"] = resumes(case, own)
    facts["partly"] = partly_used()
    if process.is_main:
        torch.save(facts, folder / f"world{process.world_size}.pt")
    runtime.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # A thread of gloo may still hold the last tensor, and needs the interpreter to let it go; should the interpreter
    # be on its way out by then, the process is aborted (about 1 run in 20). Nothing is left to clean up: skip that.
    os._exit(0)
