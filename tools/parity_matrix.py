"""Train one tiny MMDiT with every booster, layout, dtype and accumulation, and compare with one process.

python tools/parity_matrix.py                          # writes its tables into docs/boosters.md
python tools/parity_matrix.py --out parity.md --worlds 2 1

Real processes over gloo, one launch for each number of them, all layouts within. Each run takes 10 steps with active
clipping on the same global batch; the reference is plain torch on the joined batch in float32. Then every layout
writes a checkpoint, and every layout of the same and of later launches reads it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like import runtime
from opensora_like.boosters.base import Booster, OptimizerFactory
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.models.mmdit import MMDiT
from opensora_like.registry import BOOSTERS, build

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
STEPS, CLIP, SAMPLES = 10, 0.3, 8
WORLDS = (2, 4, 1)  # in this order: a launch reads what the ones before have written
ACCUMULATIONS = (1, 2)
LOSS_ROUNDING = 3e-2  # of a forward in bfloat16 against one in float32; measured: see the table
CPU = torch.device("cpu")
PACKAGES = ("torch", "colossalai", "deepspeed")


@dataclass(frozen=True)
class Layout:
    """A booster section of a config, and where it can be used."""

    name: str
    section: dict[str, Any]
    multiple: int = 1  # of processes
    dtypes: tuple[str, ...] = ("fp32", "bf16")


def colossal(name: str, plugin: str, multiple: int = 1, *, half_only: bool = False, **config: Any) -> Layout:
    """A layout of the colossalai booster."""
    section = {"type": "colossalai", "plugin": plugin, "plugin_config": config}
    return Layout(f"colossalai {name}", section, multiple, ("bf16",) if half_only else ("fp32", "bf16"))


SP = {"sp_size": 2, "enable_sequence_parallelism": True}
RING = SP | {"sequence_parallelism_mode": "ring_attn"}
LAYOUTS: tuple[Layout, ...] = (
    Layout("ddp", {"type": "ddp"}),
    colossal("zero1", "zero1"),
    colossal("zero2", "zero2"),
    colossal("zero1-seq sp2", "zero1-seq", 2, sp_size=2),
    colossal("hybrid", "hybrid"),
    colossal("hybrid tp2", "hybrid", 2, tp_size=2),
    colossal("hybrid sp2", "hybrid", 2, **SP),
    colossal("hybrid sp2 ring_attn", "hybrid", 2, **RING),
    colossal("hybrid tp2 sp2", "hybrid", 4, tp_size=2, **SP),
    colossal("hybrid zero2 tp2", "hybrid", 2, half_only=True, tp_size=2, zero_stage=2),
    colossal("hybrid zero2 sp2 ring_attn", "hybrid", 2, half_only=True, zero_stage=2, **RING),
    Layout("fsdp2", {"type": "fsdp2"}),
    Layout("fsdp2 tp2", {"type": "fsdp2", "tp_size": 2}, 2),
    Layout("fsdp2 sp2", {"type": "fsdp2", "sp_size": 2}, 2),
    Layout("fsdp2 sp2 ring", {"type": "fsdp2", "sp_size": 2, "sequence_parallelism_mode": "ring"}, 2),
    Layout("fsdp2 tp2 sp2", {"type": "fsdp2", "tp_size": 2, "sp_size": 2}, 4),
    Layout("deepspeed zero2", {"type": "deepspeed", "stage": 2}),
    Layout("deepspeed zero3", {"type": "deepspeed", "stage": 3}),
)


class Difference(NamedTuple):
    """Largest ones over the steps: of losses and norms relative, of final weights absolute."""

    loss: float
    norm: float
    weights: float


@dataclass
class Found:
    """What one launch found."""

    differences: dict[tuple[str, str, int], Difference] = field(default_factory=dict)  # (layout, dtype, accumulation)
    moves: dict[tuple[str, int, str], bool] = field(default_factory=dict)  # (written as, by how many, read as) -> exact
    absent: dict[str, str] = field(default_factory=dict)  # layout -> why it could not be built


def build_model(seed: int) -> nn.Module:
    """A tiny MMDiT whose weights are nowhere zero, so that nothing hides behind a gate."""
    model = MMDiT(
        5, 6, context_in_dim=7, hidden_size=40, num_heads=4, depth=1, depth_single_blocks=2,
        axes_dim=(2, 4, 4), mlp_ratio=1.1, patch_size=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15, generator=generator)
    return model


def data(step: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """The global batch of a step: x, t, conditions, target; 3 text and 18 image tokens, shared unevenly."""
    generator = torch.Generator().manual_seed(1000 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator)

    conditions = {"text": draw(3, 7), "pooled": draw(6)}
    return draw(5, 2, 3, 3), torch.rand(SAMPLES, generator=generator), conditions, draw(5, 2, 3, 3)


def loss_of(model: nn.Module, step: int, part: int, parts: int) -> Tensor:
    """On one of equal parts of the global batch."""
    x, t, conditions, target = data(step)
    mine = {name: value.chunk(parts)[part] for name, value in conditions.items()}
    out = model(x.chunk(parts)[part], t.chunk(parts)[part], mine)
    return (out.float() - target.chunk(parts)[part]).square().mean()


def optimizer_of(kind: str) -> OptimizerFactory:
    """SGD to compare: AdamW would turn gradients that are zero but for rounding into steps of full size."""
    if kind == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


class Run:
    """A booster with its model, as a loop has it."""

    def __init__(self, layout: Layout, *, dtype: str, optim: str, accumulation: int = 1, seed: int = 0) -> None:
        self.accumulation = accumulation
        self.booster: Booster = build(
            layout.section, BOOSTERS, where="booster", device=CPU, dtype=dtype, grad_clip=CLIP
        )
        self.model = self.booster.prepare(build_model(seed), optimizer_of(optim))

    def step(self, step: int) -> tuple[float, float]:
        """One update. Returns: loss over the global batch, gradient norm."""
        booster, total = self.booster, torch.zeros(())
        for micro in range(self.accumulation):
            with booster.micro_batch(last=micro == self.accumulation - 1):
                part = micro * booster.dp_size + booster.dp_rank
                loss = loss_of(self.model, step, part, self.accumulation * booster.dp_size)
                booster.backward(loss / self.accumulation)
            total += loss.detach() / self.accumulation
        return runtime.mean_over_ranks(total).item(), booster.step()

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """Kind -> name -> what this rank owns of masters and optimizer state; live."""
        return {"master": dict(self.booster.master_shards()), **self.booster.optimizer_shards()}

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """The same, whole, on rank 0."""
        return {kind: self.booster.gather(shards) for kind, shards in self.shards().items()}

    @torch.no_grad()
    def loss(self) -> float:
        """Over a global batch, without a step: of the weights that the model works with."""
        return runtime.mean_over_ranks(loss_of(self.model, 0, self.booster.dp_rank, self.booster.dp_size)).item()

    def checkpoints(self, folder: Path) -> CheckpointManager:
        return CheckpointManager(folder, self.booster, ema=None, config_text="", keep_n_latest=-1, order={}, about={})


def reference() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and norms of each step and final weights of plain torch on the joined batch, in float32."""
    model = build_model(0)
    optimizer, steps = optimizer_of("sgd")(list(model.parameters())), []
    for step in range(STEPS):
        loss = loss_of(model, step, 0, 1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        assert norm > CLIP, f"step {step}: clipping is not active, norm {norm}"
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm))
    return steps, {name: p.detach() for name, p in model.named_parameters()}


def compare(layout: Layout, dtype: str, accumulation: int, truth: tuple[list, dict[str, Tensor]]) -> Difference:
    """Train and measure; meaningful on rank 0."""
    run = Run(layout, dtype=dtype, optim="sgd", accumulation=accumulation)
    steps = [run.step(step) for step in range(STEPS)]
    weights = run.whole()["master"]
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(steps, truth[0], strict=True)) for i in (0, 1))
    return Difference(
        loss, norm, max((w - truth[1][n]).abs().max().item() for n, w in weights.items()) if weights else 0
    )


def write_checkpoint(layout: Layout, folder: Path) -> None:
    """After two steps of AdamW, and beside it what is in it."""
    run = Run(layout, dtype=layout.dtypes[0], optim="adamw")
    for step in range(2):
        run.step(step)
    run.checkpoints(folder).save(TrainState(step=2))
    truth = {"whole": run.whole(), "loss": run.loss()}
    if dist.get_rank() == 0:
        torch.save(truth, folder / "truth.pt")
    dist.barrier()


def read_checkpoints(layout: Layout, folders: Sequence[Path]) -> dict[tuple[str, int, str], bool]:
    """One after the other, into a run that started elsewhere. Returns: whether every bit arrived, on all ranks."""
    run, keys, exact = Run(layout, dtype=layout.dtypes[0], optim="adamw", seed=1), [], []
    manager = run.checkpoints(folders[0])  # one for all: it makes a process group
    for folder in folders:
        manager.load(next(folder.glob("epoch*-global_step2")))
        truth, loss = torch.load(folder / "truth.pt"), run.loss()
        exact.append(is_part_of(run, truth["whole"]) and abs(loss / truth["loss"] - 1) < LOSS_ROUNDING)
        world, _, written_as = folder.name.partition(" ")
        keys.append((written_as, int(world), layout.name))
    votes = torch.tensor(exact, dtype=torch.int)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return dict(zip(keys, map(bool, votes), strict=True))


def is_part_of(run: Run, whole: dict[str, dict[str, Tensor]]) -> bool:
    """Whether what this rank owns is in `whole`, bit by bit, and nothing is there that it does not have."""
    shards, places = run.shards(), run.booster.ranges()
    if {kind: tensors.keys() for kind, tensors in shards.items()} != {k: t.keys() for k, t in whole.items()}:
        return False
    for kind, tensors in shards.items():
        for name, shard in tensors.items():
            expected = whole[kind][name].reshape(-1) if shard.ndim else whole[kind][name]
            for strip in places[name].strips if shard.ndim else ():
                a = expected.as_strided((strip.count, strip.length), (strip.stride, 1), strip.start)
                b = shard.as_strided((strip.count, strip.length), (strip.step, 1), shard.storage_offset() + strip.at)
                if not torch.equal(a, b):
                    return False
            if not (shard.ndim or torch.equal(shard, expected)):
                return False
    return True


@contextmanager
def groups_given_back(layout: Layout) -> Iterator[None]:
    """Destroy the process groups that a run makes: threads of gloo, which never sleep long. DeepSpeed keeps its own."""
    before = set(distributed_c10d._world.pg_map)
    yield
    gc.collect()  # the run holds itself, and its groups their threads
    dist.barrier()
    for group in set(distributed_c10d._world.pg_map) - before if layout.section["type"] != "deepspeed" else ():
        dist.destroy_process_group(group)


def work(folder: Path) -> None:
    """What each process of a launch does."""
    process = runtime.start()
    world, found, truth = process.world_size, Found(), reference()
    usable = []
    for layout in (each for each in LAYOUTS if world % each.multiple == 0):
        try:
            build(layout.section, BOOSTERS, where="booster", device=CPU, dtype=layout.dtypes[0], grad_clip=CLIP)
        except ValueError as problem:  # a package is not installed; the table says so
            found.absent[layout.name] = str(problem)
            continue
        usable.append(layout)
        for dtype in layout.dtypes:
            for accumulation in ACCUMULATIONS:
                key = (layout.name, dtype, accumulation)
                with groups_given_back(layout):
                    found.differences[key] = compare(layout, dtype, accumulation, truth)
                if process.is_main:
                    print(world, *key, *map("{:.1e}".format, found.differences[key]), flush=True)
    for layout in usable:
        with groups_given_back(layout):
            write_checkpoint(layout, folder / f"{world} {layout.name}")
    folders = sorted(path.parent for path in folder.glob("*/truth.pt"))
    for i, layout in enumerate(usable):
        # all of this launch, and every fourth of the others
        mine = [f for j, f in enumerate(folders) if f.name.startswith(f"{world} ") or (i + j) % 4 == 0]
        with groups_given_back(layout):
            found.moves |= read_checkpoints(layout, mine)
    if process.is_main:
        torch.save(found, folder / f"world{world}.pt")
    runtime.finish()


def launch(world: int, folder: Path) -> Found:
    """Run `work` in that many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    subprocess.run([*start, __file__, "--work", str(folder)], env=environment, check=True)
    return torch.load(folder / f"world{world}.pt", weights_only=False)


def numbers_table(found: dict[int, Found], dtype: str) -> list[str]:
    """Rows of layouts, columns of processes and accumulation."""
    columns = [(world, accumulation) for world in sorted(found) for accumulation in ACCUMULATIONS]
    heads = [f"{world} proc., acc. {accumulation}" for world, accumulation in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for layout in (each for each in LAYOUTS if dtype in each.dtypes):
        cells = []
        for world, accumulation in columns:
            difference = found[world].differences.get((layout.name, dtype, accumulation))
            cells.append("" if difference is None else " / ".join(map(_short, difference)))
        lines += [f"| {layout.name} | " + " | ".join(cells) + " |"] if any(cells) else []
    return lines


def moves_table(found: dict[int, Found]) -> list[str]:
    """How many checkpoints moved between how many processes, and which did not arrive bit by bit."""
    lines = ["| written by | read by | pairs of layouts | exact |", "|---|---|---|---|"]
    wrong = []
    for world, each in sorted(found.items()):
        for origin in sorted({origin for _, origin, _ in each.moves}):
            moves = {move: exact for move, exact in each.moves.items() if move[1] == origin}
            lines.append(f"| {origin} proc. | {world} proc. | {len(moves)} | {sum(moves.values())} |")
            bad = [move for move, exact in moves.items() if not exact]
            wrong += [f"- not exact: {a} on {origin} -> {b} on {world}" for a, _, b in bad]
    return [*lines, *(["", *wrong] if wrong else [])]


def tables(found: dict[int, Found]) -> str:
    """All of it in markdown."""
    kinds = [f"{name} {_version(name)}" for name in PACKAGES]
    lines = [
        f"Measured on {datetime.date.today()} by `python tools/parity_matrix.py`: python {platform.python_version()},"
        f" {', '.join(kinds)}, {platform.machine()} CPU, gloo; {STEPS} steps of SGD with momentum, `grad_clip`={CLIP},"
        " below every norm, 8 samples in each global batch. A cell is the largest difference of losses (relative) / of"
        " gradient norms (relative) / of final weights (absolute).",
        "",
        "**float32**, against one process in float32 on the joined batch:",
        "",
        *numbers_table(found, "fp32"),
        "",
        "**bfloat16**, against the same float32 run: what is left is rounding, of 8 bits.",
        "",
        *numbers_table(found, "bf16"),
        "",
        "**Checkpoints**, written after two steps of AdamW in each layout above and read in each, on as many processes;"
        " between numbers of processes every fourth pair. Exact means every bit of masters and optimizer state. All are"
        " written in float32, but for those that have bfloat16 only.",
        "",
        *moves_table(found),
    ]
    absent = {f"- {name} was not run: {why}" for each in found.values() for name, why in each.absent.items()}
    return "\n".join([*lines, "", *sorted(absent)]).rstrip()


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-").replace("0e+00", "0")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def put_into(path: Path, text: str) -> None:
    """Between the marks, which are made at the end of the file where there are none."""
    old = path.read_text() if path.exists() else ""
    head, rest = (old if END in old else f"{old}\n{BEGIN}\n{END}\n").split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "boosters.md")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="numbers of processes, in order")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        # A thread of gloo may still hold a tensor while the interpreter ends, and would abort the process.
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        found = {world: launch(world, Path(folder)) for world in arguments.worlds}
    put_into(arguments.out, tables(found))
    wrong = [move for each in found.values() for move, exact in each.moves.items() if not exact]
    if wrong:
        raise SystemExit(f"{len(wrong)} checkpoints did not arrive as they were, e.g. {wrong[0]}")


if __name__ == "__main__":
    main()
