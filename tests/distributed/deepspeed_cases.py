"""Trains the tiny model of `booster_cases` with DeepSpeed in one set of processes and writes what came out.

    torchrun --nproc_per_node 2 deepspeed_cases.py FOLDER        (or plain python: one process)

Rank 0 writes ``deepspeed_world{N}.pt``: case -> facts. Two processes leave checkpoints in FOLDER, which a later run
with one process reads.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from booster_cases import STEPS, Case, Tiny, Trained, loss_of, optimizer_of, parts
from parity_harness import CPU, everywhere, same_on_all_ranks, same_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_like import runtime
from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.registry import BOOSTERS, build
from opensora_like.training.ema import EMA

ROOT = Path(__file__).parents[2]
STAGES = ("zero1", "zero2", "zero3")
CLIP = 0.05  # below every norm of these runs
FEW = 4  # steps, where a mistake shows in the second
# So small that the tiny model fills several buckets and groups, with weights larger than one; in stage 3 some
# weights stay whole on every rank and some do not.
SMALL = {
    "reduce_bucket_size": 200,
    "allgather_bucket_size": 300,
    "sub_group_size": 300,
    "stage3_param_persistence_threshold": 20,
}


def zero(**settings: Any) -> tuple[tuple[str, Any], ...]:
    return (("config", {"zero_optimization": {**SMALL, **settings}}),)


PLAIN = {
    f"{stage} {dtype} {optim} x{accumulation}": Case(stage, dtype, optim, accumulation, CLIP, zero())
    for stage in STAGES
    for dtype in ("fp32", "bf16")
    for optim in ("sgd", "adamw")
    for accumulation in (1, 2)
}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
WITH_OPTIONS = {
    "no clipping 1": Case("zero1", options=zero()),
    "no clipping 3": Case("zero3", options=zero()),
    "order 1": Case("zero1", "fp32", "sgd", 2, CLIP, zero(round_robin_gradients=True, parameter_alignment=True)),
    "order 2": Case("zero2", "fp32", "sgd", 2, CLIP, zero(round_robin_gradients=True, contiguous_gradients=False)),
    "offload 1": Case("zero1", "fp32", "sgd", 2, CLIP, (("cpu_offload", True), *zero())),
    "offload 2": Case("zero2", "fp32", "sgd", 2, CLIP, (("cpu_offload", True), *zero())),
    "offload 3": Case("zero3", "fp32", "sgd", 2, CLIP, zero(**OFFLOADED)),
    "file 2": Case(
        "zero2",
        "fp32",
        "sgd",
        2,
        CLIP,
        (("config", str(ROOT / "configs/_base_/deepspeed/zero_stage2_config.json")),),
    ),
    "file 3": Case(
        "zero3",
        "fp32",
        "sgd",
        2,
        CLIP,
        (("config", str(ROOT / "configs/_base_/deepspeed/zero_stage3_config.json")),),
    ),
    "float32 sums 2": Case(
        "zero2", "bf16", "sgd", 2, CLIP, (("config", {"data_types": {"grad_accum_dtype": "fp32"}}),)
    ),
    "float32 sums 3": Case(
        "zero3", "bf16", "sgd", 2, CLIP, (("config", {"data_types": {"grad_accum_dtype": "fp32"}}),)
    ),
}
RESUMED = [
    Case(stage, dtype, optim, 2, CLIP, zero())
    for stage in STAGES
    for dtype, optim in (("fp32", "sgd"), ("bf16", "adamw"))
]


def booster_of(case: Case) -> Booster:
    section = {"type": "deepspeed", "stage": int(case.booster[-1]), **dict(case.options)}
    return build(section, BOOSTERS, where="booster", device=CPU, dtype=case.dtype, grad_clip=case.grad_clip)


class Engine(Trained):
    """A DeepSpeed booster with its model, as a loop has it."""

    def __init__(self, case: Case, *, seed: int = 0) -> None:
        self.case, self.booster, self.plain = case, booster_of(case), Tiny(seed)
        self.model = self.booster.prepare(self.plain, optimizer_of(case.optim))
        self.losses: list[float] = []

    def step(self, step: int, *, bad_rank: int | None = None, large: Callable[[int], bool] = lambda i: True) -> float:
        """One update on this rank's share of the global batch. `large`: micro-batch -> use `only_for_large`."""
        case, booster, total = self.case, self.booster, torch.zeros(())
        for i, micro in enumerate(parts(step, case.accumulation, booster.dp_size)):
            x, y = micro[booster.dp_rank]
            if bad_rank == booster.dp_rank:
                x = x.clone().fill_(float("inf"))
            with booster.micro_batch(last=i == case.accumulation - 1):
                loss = loss_of(self.model(x, large=large(i)), y) / case.accumulation
                booster.backward(loss)
            total += loss.detach()
        self.losses.append(runtime.mean_over_ranks(total).item())
        return booster.step()

    def working(self) -> dict[str, Tensor]:
        """Copies of the whole weights that the model computes with."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.plain.parameters()), enabled=self.case.booster == "zero3"):
            return {f"working/{n}": p.detach().clone() for n, p in self.plain.named_parameters()}

    def snapshot(self) -> dict[str, Tensor]:
        kept = {f"master/{n}": t.clone() for n, t in self.booster.master_shards()}
        for kind, tensors in self.booster.optimizer_shards().items():
            kept |= {f"{kind}/{n}": t.clone() for n, t in tensors.items()}
        return kept | {n: t for n, t in self.working().items() if n != "working/frozen"}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Whole optimizer state on rank 0."""
        return {kind: self.booster.gather(tensors) for kind, tensors in self.booster.optimizer_shards().items()}


def manager(booster: Booster, folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, booster, ema=None, config_text="", keep_n_latest=-1, order={}, about={})


def trains(case: Case) -> dict[str, Any]:
    """Losses, norms and weights at the end, and whether weights are what they should be everywhere."""
    run = Engine(case)
    start, norms = run.masters(), run.steps(0, STEPS)
    masters, working = run.masters(), run.working()
    rounded = {n: t.to(working[f"working/{n}"].dtype) for n, t in masters.items()}
    return {
        "start": start,
        "losses": run.losses,
        "norms": norms,
        "masters": masters,
        "working_are_masters": all(torch.equal(t, working[f"working/{n}"]) for n, t in rounded.items()),
        "ranks_agree": same_on_all_ranks(iter(working.values())),
        "frozen_kept": torch.equal(working["working/frozen"], Tiny(0).frozen.to(working["working/frozen"].dtype)),
        "table_kept": torch.equal(run.plain.table, Tiny(0).table),
    }


def skips_non_finite(case: Case) -> dict[str, Any]:
    """A step with inf on the last rank, between good steps: what it returns, and what it leaves."""
    run, clean = Engine(case), Engine(case)
    run.steps(0, 2)
    clean.steps(0, 2)
    before = run.snapshot()
    norm = run.step(2, bad_rank=run.booster.dp_size - 1)
    unchanged = everywhere(same_tensors(before, run.snapshot()))
    norms = (run.step(3), clean.step(3))
    forgotten = everywhere(same_tensors(run.snapshot(), clean.snapshot()))
    return {"norm": norm, "unchanged": unchanged, "forgotten": forgotten and norms[0] == norms[1]}


def resumes(case: Case, folder: Path) -> dict[str, Any]:
    """Half a run, saved, loaded into another model, and finished; against the whole run."""
    whole, first, second = Engine(case), Engine(case), Engine(case, seed=1)
    norms = whole.steps(0, STEPS)
    first.booster.optimizer_shards()  # made before the first step: must change nothing
    halves = first.steps(0, STEPS // 2)
    ema = EMA(first.booster, 0.5)
    saved = manager(first.booster, folder).save(TrainState(step=STEPS // 2))
    _share_frozen(second, first)
    manager(second.booster, folder).load(saved)
    restored = everywhere(same_tensors(first.snapshot(), second.snapshot()))
    halves += second.steps(STEPS // 2, STEPS)
    return {
        "restored": restored,
        "norms_equal": norms == halves,
        "equal": everywhere(same_tensors(whole.snapshot(), second.snapshot())),
        "masters": first.masters(),
        "ema": first.booster.gather(ema.shards),
        "state": first.states(),
        "final": whole.masters(),
    }


def _share_frozen(run: Engine, other: Engine) -> None:
    """A checkpoint does not hold frozen weights."""
    import deepspeed

    frozen = other.working()["working/frozen"]
    with deepspeed.zero.GatheredParameters([run.plain.frozen], modifier_rank=0, enabled=run.case.booster == "zero3"):
        run.plain.frozen.data.copy_(frozen)


def reads_other_world(case: Case, folder: Path) -> dict[str, Any]:
    """What two ranks wrote, read by one, and the run finished."""
    run = Engine(case, seed=1)
    _share_frozen(run, Engine(case))
    manager(run.booster, folder).load(folder / "epoch0-global_step5")
    masters, state = run.masters(), run.states()
    run.steps(STEPS // 2, STEPS)
    return {"masters": masters, "state": state, "final": run.masters()}


def leaves_out(case: Case, large: Callable[[int, int], bool]) -> dict[str, Any]:
    """A weight that only some micro-batches use. `large`: (step, micro-batch) -> used."""
    run = Engine(case)
    norms = [run.step(step, large=lambda i, step=step: large(step, i)) for step in range(FEW)]
    return {"norms": norms, "masters": run.masters()}


USES = {
    "every other step": lambda step, micro: step % 2 == 0,
    "first micro-batch": lambda step, micro: micro == 0,
    "last micro-batch": lambda step, micro: micro == 1,
}


class Twice(nn.Module):
    """Runs the tiny model twice, once under gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.tiny(x) + checkpoint(self.tiny, x * 2, use_reentrant=False)


def many_forwards(case: Case) -> dict[str, Any]:
    """Two forwards before a backward, recomputation, and a forward without gradients between steps."""
    booster, model = booster_of(case), Twice()
    called = booster.prepare(model, optimizer_of("sgd"))
    norms = []
    for step in range(FEW):
        x, y = parts(step, 1, booster.dp_size)[0][booster.dp_rank]
        with booster.micro_batch(last=True):
            booster.backward(loss_of(called(x) - called(-x), y))
        norms.append(booster.step())
        with torch.no_grad():
            called(x)
    masters = booster.gather(dict(booster.master_shards()))
    return {"norms": norms, "masters": {n.removeprefix("tiny."): t for n, t in masters.items()}}


def fills_meta(case: Case) -> dict[str, Any]:
    """A model on meta, filled through the views as a load does."""
    import deepspeed

    booster = booster_of(case)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    called = booster.prepare(model, optimizer_of("sgd"))
    for name, shard in booster.master_shards():
        shard.copy_(torch.arange(*booster.ranges()[name][1:]) / 8)
    booster.refresh()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=case.booster == "zero3"):
        filled = all(torch.equal(p.float(), torch.arange(p.numel()).reshape(p.shape) / 8) for p in model.parameters())
    return {"filled": everywhere(filled), "finite": bool(called(torch.ones(2, 3).bfloat16()).isfinite().all())}


def reads_ddp(folder: Path) -> dict[str, Any]:
    """A checkpoint of the ddp booster, which counts steps per parameter, read by DeepSpeed."""
    case = Case("ddp", "fp32", "adamw")
    wrote = Trained(case)
    wrote.steps(0, 3)
    saved = manager(wrote.booster, folder).save(TrainState(step=3))
    run = Engine(Case("zero2", "fp32", "adamw", 1, 0.0, zero()), seed=1)
    manager(run.booster, folder).load(saved)
    kinds = {k: wrote.booster.gather(t) for k, t in wrote.booster.optimizer_shards().items()}
    return {"masters": (wrote.masters(), run.masters()), "state": (kinds, run.states())}


def main(folder: Path) -> None:
    process = runtime.start()
    facts: dict[str, Any] = {}
    for stage in STAGES:  # stage 3 last: DeepSpeed then replaces functional.linear for the whole process
        gc.freeze()  # DeepSpeed collects garbage whenever it is set up, and the libraries are large
        for name, case in {**PLAIN, **WITH_OPTIONS}.items():
            if case.booster == stage:
                facts[f"trains {name}"] = trains(case)
        facts[f"meta {stage}"] = fills_meta(Case(stage, "bf16", options=zero(stage3_param_persistence_threshold=10)))
        for dtype in ("fp32", "bf16"):
            facts[f"skips {stage} {dtype}"] = skips_non_finite(Case(stage, dtype, "adamw", 2, CLIP, zero()))
        to_host = OFFLOADED if stage == "zero3" else {"offload_optimizer": {"device": "cpu"}}
        offloaded = Case(stage, "fp32", "sgd", 2, CLIP, zero(**to_host))
        facts[f"skips {stage} offloaded"] = skips_non_finite(offloaded)
        for use, large in USES.items():
            for where, case in {"device": Case(stage, "fp32", "sgd", 2, options=zero()), "host": offloaded}.items():
                facts[f"leaves out {stage} {where} {use}"] = leaves_out(case, large)
        facts[f"many forwards {stage}"] = many_forwards(Case(stage, options=zero()))
    for case in RESUMED:
        saved = folder / f"{case.booster}_{case.dtype}"
        if process.world_size == 1 and saved.is_dir():
            facts[f"reads {case.booster} {case.dtype}"] = reads_other_world(case, saved)
        own = saved if process.world_size > 1 else saved.with_name(f"{saved.name}_alone")
        facts[f"resumes {case.booster} {case.dtype}"] = resumes(case, own)
    facts["reads ddp"] = reads_ddp(folder / f"ddp{process.world_size}")
    if process.is_main:
        torch.save(facts, folder / f"deepspeed_world{process.world_size}.pt")
    dist.barrier()
    runtime.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
