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
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
CPU = torch.device("cpu")
PACKAGES = ("torch", "colossalai", "deepspeed")


@dataclass(frozen=True)
class Layout:
    """A booster section of a config, and where it can be used."""

    name: str
    section: dict[str, Any]
    multiple: int = 1  # of processes
    dtypes: tuple[str, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Colossal(Layout):
    """A layout of the colossalai booster."""

    def __init__(self, name: str, plugin: str, multiple: int = 1, *, half_only: bool = False, **config: Any) -> None:
        section = {"type": "colossalai", "plugin": plugin, "plugin_config": config}
        super().__init__(name, section, multiple, ("bf16",) if half_only else ("fp32", "bf16"))


SP = {"sp_size": 2, "enable_sequence_parallelism": True}
RING = SP | {"sequence_parallelism_mode": "ring_attn"}
LAYOUTS: tuple[Layout, ...] = (
    Layout("ddp", {"type": "ddp"}),
    Colossal("colossalai zero1", "zero1"),
    Colossal("colossalai zero2", "zero2"),
    Colossal("colossalai zero1-seq sp2", "zero1-seq", 2, sp_size=2),
    Colossal("colossalai hybrid", "hybrid"),
    Colossal("colossalai hybrid tp2", "hybrid", 2, tp_size=2),
    Colossal("colossalai hybrid sp2", "hybrid", 2, **SP),
    Colossal("colossalai hybrid sp2 ring_attn", "hybrid", 2, **RING),
    Colossal("colossalai hybrid tp2 sp2", "hybrid", 4, tp_size=2, **SP),
    Colossal("colossalai hybrid zero2 tp2", "hybrid", 2, half_only=True, tp_size=2, zero_stage=2),
    Colossal("colossalai hybrid zero2 sp2 ring_attn", "hybrid", 2, half_only=True, zero_stage=2, **RING),
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

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """Kind -> name -> whole tensor, on rank 0: masters and optimizer state."""
        kinds = {"master": dict(self.booster.master_shards()), **self.booster.optimizer_shards()}
        return {kind: self.booster.gather(shards) for kind, shards in kinds.items()}

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


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[kind].keys() == b[kind].keys() and all(torch.equal(a[kind][n], b[kind][n]) for n in a[kind]) for kind in a
    )


def write_checkpoint(layout: Layout, folder: Path) -> None:
    """After two steps of AdamW, and beside it what is in it."""
    run = Run(layout, dtype=layout.dtypes[0], optim="adamw")
    for step in range(2):
        run.step(step)
    run.checkpoints(folder).save(TrainState(step=2))
    whole = run.whole()
    if dist.get_rank() == 0:
        torch.save(whole, folder / "truth.pt")
    dist.barrier()


def read_checkpoints(layout: Layout, folders: Sequence[Path]) -> dict[tuple[str, int, str], bool]:
    """One after the other into one run that started elsewhere. Returns: whether every bit arrived, on rank 0."""
    run, exact = Run(layout, dtype=layout.dtypes[0], optim="adamw", seed=1), {}
    for folder in folders:
        saved = next(folder.glob("epoch*-global_step2"))
        run.checkpoints(folder).load(saved)
        whole = run.whole()
        world, _, written_as = folder.name.partition(" ")
        key = (written_as, int(world), layout.name)
        exact[key] = dist.get_rank() != 0 or same(whole, torch.load(folder / "truth.pt"))
    return exact


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
                found.differences[key] = compare(layout, dtype, accumulation, truth)
                if process.is_main:
                    print(world, *key, *map("{:.1e}".format, found.differences[key]), flush=True)
    for layout in usable:
        write_checkpoint(layout, folder / f"{world} {layout.name}")
    folders = sorted(path.parent for path in folder.glob("*/truth.pt"))
    for layout in usable:
        found.moves |= read_checkpoints(layout, folders)
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
        if any(cells):
            lines.append(f"| {layout.name} | " + " | ".join(cells) + " |")
    return lines


def moves_table(found: dict[int, Found]) -> list[str]:
    """Rows: written as; columns: read as; how many pairs of process counts were tried, and whether all were exact."""
    moves: dict[tuple[str, str], list[bool]] = {}
    for each in found.values():
        for (written_as, _, read_as), exact in each.moves.items():
            moves.setdefault((written_as, read_as), []).append(exact)
    names = [layout.name for layout in LAYOUTS if any(layout.name in pair for pair in moves)]
    lines = [f"{i + 1}. {name}" for i, name in enumerate(names)]
    lines += ["", "| written as \\ read as | " + " | ".join(str(i + 1) for i in range(len(names))) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for i, a in enumerate(names):
        cells = []
        for b in names:
            tried = moves.get((a, b), [])
            cells.append("" if not tried else f"{len(tried)}" if all(tried) else f"{tried.count(False)} WRONG")
        lines.append(f"| {i + 1} | " + " | ".join(cells) + " |")
    return lines


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
        "**Checkpoints** (AdamW after two steps): a number says for how many pairs of process counts a checkpoint"
        " written in the row's layout was read in the column's, every bit of masters and optimizer state as it was.",
        "",
        *moves_table(found),
    ]
    absent = {name: why for each in found.values() for name, why in each.absent.items()}
    lines += ["", *(f"- {name} was not run: {why}" for name, why in absent.items())] if absent else []
    return "\n".join(lines)


def _short(number: float) -> str:
    """One digit: 0, 1e-7."""
    return f"{number:.0e}".replace("e-0", "e-").replace("0e+00", "0")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def put_into(path: Path, text: str) -> None:
    """Between the marks, which are made at the end of the file where there are none."""
    old = path.read_text() if path.exists() else ""
    if BEGIN not in old or END not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    head, rest = old.split(BEGIN, 1)
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
