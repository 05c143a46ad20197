"""Runs of tiny models with any booster: how they start, step, are written, read and compared; tests and
tools/parity_matrix.py share it.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from opensora_like import runtime
from opensora_like.boosters.base import Booster, OptimizerFactory
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.registry import BOOSTERS, build
from opensora_like.training.ema import EMA

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LossOf = Callable[[nn.Module, int, int, int], Tensor]  # (model, step, part, parts of the global batch) -> loss
Whole = dict[str, dict[str, Tensor]]  # kind, as "master" or "exp_avg" -> name -> whole tensor


def launch(script: Path, *arguments: str, world: int, timeout_seconds: float = 300, **variables: str) -> str:
    """Run a script in `world` processes, by torchrun where there is more than one. Returns: all that was printed.

    Args:
        variables: of the environment, besides what this process has.
    """
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    # one thread each; and gloo looks the machine's own name up unless it is told which interface to use
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    environment |= variables
    for inherited in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        environment.pop(inherited, None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, *([*torchrun, f"--nproc_per_node={world}"] if world > 1 else []), str(script)]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    assert done.returncode == 0, f"{world} processes: {done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout + done.stderr


class TrainingRun:
    """A booster with its model, as a loop has it.

    Args:
        section: the config's `booster`.
        loss_of: the loss on one of equal parts of the global batch of a step.
        accumulation: micro-batches of a step.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        *,
        dtype: str,
        grad_clip: float,
        model: nn.Module,
        optimizer: OptimizerFactory,
        loss_of: LossOf,
        accumulation: int = 1,
    ) -> None:
        self.accumulation, self._loss_of = accumulation, loss_of
        self.booster: Booster = build(section, BOOSTERS, where="booster", device=CPU, dtype=dtype, grad_clip=grad_clip)
        self.model = self.booster.prepare(model, optimizer)

    def step(self, step: int, *, factor: float = 1.0) -> tuple[float, float]:
        """One update. Returns: loss over the global batch, gradient norm."""
        booster, total = self.booster, torch.zeros(())
        for micro in range(self.accumulation):
            with booster.micro_batch(last=micro == self.accumulation - 1):
                part = micro * booster.dp_size + booster.dp_rank
                loss = self._loss_of(self.model, step, part, self.accumulation * booster.dp_size) * factor
                booster.backward(loss / self.accumulation)
            total += loss.detach() / self.accumulation
        return runtime.mean_over_ranks(total).item(), booster.step()

    @torch.no_grad()
    def loss(self, step: int) -> float:
        """Over the global batch of a step, with the weights as they are now; as a validation would, without update."""
        part = self._loss_of(self.model, step, self.booster.dp_rank, self.booster.dp_size)
        return runtime.mean_over_ranks(part).item()

    def shards(self, ema: EMA | None = None) -> Whole:
        """Kind -> name -> what this rank owns, live."""
        kinds = {"master": dict(self.booster.master_shards()), **self.booster.optimizer_shards()}
        return kinds if ema is None else {**kinds, "ema": ema.shards}

    def whole(self, ema: EMA | None = None) -> Whole:
        """Kind -> name -> whole tensor, on rank 0."""
        return {kind: self.booster.gather(shards) for kind, shards in self.shards(ema).items()}

    def checkpoints(self, folder: Path, ema: EMA | None = None) -> CheckpointManager:
        """With no settings but those that have to be given."""
        averages = None if ema is None else ema.shards
        return CheckpointManager(
            folder, self.booster, ema=averages, config_text="", keep_n_latest=-1, order={}, about={}
        )


@contextmanager
def groups_given_back(*, keeps_groups: bool = False) -> Iterator[None]:
    """Destroy the process groups that a run makes: each has threads of gloo, which never sleep long.

    Args:
        keeps_groups: for a library that uses its groups again, as DeepSpeed does: leave them.
    """
    before = set(distributed_c10d._world.pg_map)
    yield
    gc.collect()  # a run holds itself, and its groups their threads
    dist.barrier()
    for group in set() if keeps_groups else set(distributed_c10d._world.pg_map) - before:
        dist.destroy_process_group(group)


def everywhere(claim: bool) -> bool:
    """Whether all ranks say so."""
    votes = torch.tensor([int(claim)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same names, and every bit the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a: Whole, b: Whole) -> bool:
    """`same_tensors`, kind by kind."""
    return a.keys() == b.keys() and all(same_tensors(a[kind], b[kind]) for kind in a)


def same_on_all_ranks(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank has what rank 0 has."""
    equal = True
    for tensor in tensors:
        rank0 = tensor.detach().clone()
        dist.broadcast(rank0, src=0)
        equal = equal and torch.equal(rank0, tensor)
    return everywhere(equal)


def message_of(action: Callable[[], Any]) -> str:
    """Of the ValueError that it raises, "" if it raises none."""
    try:
        action()
    except ValueError as problem:
        return str(problem)
    return ""


def saves(run: TrainingRun, folder: Path) -> None:
    """Two steps, written as a checkpoint, and beside it ``truth.pt``: what was in it, and what the next step gives."""
    ema = EMA(run.booster, 0.5)
    for step in range(2):
        run.step(step)
        ema.update(step + 1)
    run.checkpoints(folder, ema).save(TrainState(step=2))
    whole = run.whole(ema)
    loss, norm = run.step(2)
    if dist.get_rank() == 0:
        torch.save({"whole": whole, "loss": loss, "norm": norm}, folder / "truth.pt")
    dist.barrier()


def loads(run: TrainingRun, folder: Path) -> dict[str, Any]:
    """A checkpoint of any layout, read into a run that began elsewhere and was used before, as for a validation.

    Returns: whether every bit arrived, and by how much loss and norm of the next step are off, relatively.
    """
    truth = torch.load(folder / "truth.pt")
    run.loss(0)
    ema = EMA(run.booster, 0.5)
    run.checkpoints(folder, ema).load(folder / "epoch0-global_step2")
    whole = run.whole(ema)
    exact = dist.get_rank() != 0 or same(whole, truth["whole"])
    loss, norm = run.step(2)
    return {"exact": everywhere(exact), "loss": abs(loss / truth["loss"] - 1), "norm": abs(norm / truth["norm"] - 1)}


def skips_non_finite(run: TrainingRun, clean: TrainingRun) -> dict[str, Any]:
    """A step whose loss is infinite on the last rank only, between good ones; `clean` is its like without it."""
    run.step(0)
    clean.step(0)
    before = run.whole()
    is_last = dist.get_rank() == dist.get_world_size() - 1
    _, norm = run.step(1, factor=float("inf") if is_last else 1.0)
    unchanged = everywhere(same(before, run.whole()))
    run.step(2)
    clean.step(2)
    return {"norm": norm, "unchanged": unchanged, "forgotten": everywhere(same(run.whole(), clean.whole()))}


def is_part_of(run: TrainingRun, whole: Whole, ema: EMA | None = None) -> bool:
    """Whether what this rank owns is in `whole`, bit by bit, and nothing is there that it does not have."""
    shards, places = run.shards(ema), run.booster.ranges()
    if {kind: tensors.keys() for kind, tensors in shards.items()} != {k: t.keys() for k, t in whole.items()}:
        return False
    for kind, tensors in shards.items():
        for name, shard in tensors.items():
            if shard.ndim == 0:
                if not torch.equal(shard, whole[kind][name]):
                    return False
                continue
            flat = whole[kind][name].reshape(-1)
            for strip in places[name].strips:
                a = flat.as_strided((strip.count, strip.length), (strip.stride, 1), strip.start)
                b = shard.as_strided((strip.count, strip.length), (strip.step, 1), shard.storage_offset() + strip.at)
                if not torch.equal(a, b):
                    return False
    return True
