"""Train one tiny MMDiT with every booster, layout, dtype, accumulation, with and without LoRA, and compare with one
process.

python tools/parity_matrix.py                          # writes its tables into docs/boosters.md
python tools/parity_matrix.py --out parity.md --worlds 2 --only ddp zero2

Real processes over gloo, one launch for each number of them, all layouts within. Each run takes 10 steps with active
clipping on the same global batch. The reference in float32 is plain torch on the joined batch; in bfloat16 it is the
same booster in one process, beside the spread: how far one-process runs are apart that cut the same batch into other
micro-batches, of samples in other orders. Then every layout writes a checkpoint, which layouts of the same and of
later launches read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity_tables import put_into, tables

from opensora_like import runtime
from opensora_like.boosters.base import OptimizerFactory
from opensora_like.models.lora import add_lora
from opensora_like.models.mmdit import MMDiT
from opensora_like.registry import BOOSTERS, build
from opensora_like.training.ema import EMA
from tests.distributed.parity_harness import CPU, LossOf, TrainingRun, everywhere, groups_given_back, is_part_of, saves

ROOT = Path(__file__).resolve().parents[1]
STEPS, CLIP, SAMPLES = 10, 0.3, 8
WORLDS = (2, 4, 1)  # in this order: a launch reads what the ones before have written
ACCUMULATIONS = (1, 2)
CUTS, SHUFFLES = (1, 2, 4, 8), (0, 1, 2)  # micro-batches and sample orders of one process in bfloat16: the spread
EVERY = 4  # in 2 processes each layout reads all checkpoints; else its own, and by turns one in so many of the others
LOSS_ROUNDING = 3e-2  # of a forward in bfloat16 against one in float32; measured: see the table
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["qkv", "proj", "linear1", "linear2"]}


@dataclass(frozen=True)
class Layout:
    """A booster section of a config, and where it can be used.

    Args:
        alone: name of the layout that is the same in one process.
        multiple: of processes that it needs.
        lora: whether it takes adapters.
    """

    name: str
    section: dict[str, Any]
    alone: str
    multiple: int = 1
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    lora: bool = True


def plain(name: str, kind: str, multiple: int = 1, **settings: Any) -> Layout:
    """A layout of a booster whose settings are its own."""
    alone = name if multiple == 1 else kind
    return Layout(name, {"type": kind, **settings}, alone, multiple, lora="tp_size" not in settings)


def colossal(plugin: str, extra: str = "", multiple: int = 1, *, half_only: bool = False, **config: Any) -> Layout:
    """A layout of the colossalai booster."""
    section = {"type": "colossalai", "plugin": plugin, "plugin_config": config}
    stage = f" zero{config['zero_stage']}" if "zero_stage" in config else ""
    alone = f"colossalai {plugin.removesuffix('-seq')}{stage}"
    dtypes = ("bf16",) if half_only else ("fp32", "bf16")
    name = f"colossalai {plugin}{stage}{extra and ' '}{extra}"
    return Layout(name, section, alone, multiple, dtypes, "tp_size" not in config)


SP = {"sp_size": 2, "enable_sequence_parallelism": True}
RING = SP | {"sequence_parallelism_mode": "ring_attn"}
SPLIT = {"tp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "split_gather"}
LAYOUTS: tuple[Layout, ...] = (
    plain("ddp", "ddp"),
    plain("ddp sp2", "ddp", 2, sp_size=2),
    plain("ddp sp2 ring", "ddp", 2, sp_size=2, sequence_parallelism_mode="ring"),
    colossal("zero1"),
    colossal("zero2"),
    colossal("zero1-seq", "sp2", 2, sp_size=2),
    colossal("zero2-seq", "sp2 ring_attn", 2, sp_size=2, sequence_parallelism_mode="ring_attn"),
    colossal("hybrid"),
    colossal("hybrid", "tp2", 2, tp_size=2),
    colossal("hybrid", "sp2", 2, **SP),
    colossal("hybrid", "sp2 ring_attn", 2, **RING),
    colossal("hybrid", "tp2 sp2", 4, tp_size=2, **SP),
    colossal("hybrid", "tp2 split_gather", 2, **SPLIT),
    colossal("hybrid", half_only=True, zero_stage=2),
    colossal("hybrid", "tp2", 2, half_only=True, tp_size=2, zero_stage=2),
    colossal("hybrid", "sp2 ring_attn", 2, half_only=True, zero_stage=2, **RING),
    colossal("hybrid", "tp2 split_gather", 2, half_only=True, zero_stage=2, **SPLIT),
    plain("fsdp2", "fsdp2"),
    plain("fsdp2 hsdp2", "fsdp2", 4, dp_replicate_size=2),
    plain("fsdp2 tp2", "fsdp2", 2, tp_size=2),
    plain("fsdp2 sp2", "fsdp2", 2, sp_size=2),
    plain("fsdp2 sp2 ring", "fsdp2", 2, sp_size=2, sequence_parallelism_mode="ring"),
    plain("fsdp2 tp2 sp2", "fsdp2", 4, tp_size=2, sp_size=2),
    # stage 3 last: DeepSpeed then replaces functional.linear for the whole process
    plain("deepspeed zero2", "deepspeed", stage=2),
    plain("deepspeed zero3", "deepspeed", stage=3),
)


class Key(NamedTuple):
    """One training run of a launch."""

    layout: str
    dtype: str
    lora: bool
    accumulation: int
    shuffle: int = 0  # which order the samples of each global batch are in


class Track(NamedTuple):
    """Where a run went: (loss, gradient norm) of each step, and its weights at the end."""

    steps: list[tuple[float, float]]
    weights: dict[str, Tensor]


@dataclass
class Found:
    """What one launch found."""

    tracks: dict[Key, Track] = field(default_factory=dict)
    moves: dict[tuple[str, int, str], bool] = field(default_factory=dict)  # (written as, by how many, read as) -> exact
    absent: dict[str, str] = field(default_factory=dict)  # layout -> why it could not be built


def build_model(seed: int, *, lora: bool = False) -> nn.Module:
    """A tiny MMDiT whose weights are nowhere zero, so that nothing hides behind a gate."""
    model = MMDiT(
        5, 6, context_in_dim=7, hidden_size=40, num_heads=4, depth=1, depth_single_blocks=2,
        axes_dim=(2, 4, 4), mlp_ratio=1.1, patch_size=1,
    )  # fmt: skip
    if lora:
        add_lora(model, LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15, generator=generator)
    return model


def data(step: int) -> dict[str, Tensor]:
    """The global batch of a step: x, t, conditions, target; 3 text and 18 image tokens, shared unevenly."""
    generator = torch.Generator().manual_seed(1000 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator)

    batch = {"text": draw(3, 7), "pooled": draw(6), "x": draw(5, 2, 3, 3)}
    return batch | {"t": torch.rand(SAMPLES, generator=generator), "target": draw(5, 2, 3, 3)}


def loss_of(model: nn.Module, step: int, part: int, parts: int, *, shuffle: int = 0) -> Tensor:
    """On one of equal parts of the global batch; `shuffle` above 0 is an order of its samples."""
    order = torch.arange(SAMPLES)
    if shuffle:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1000 * shuffle + step))
    mine = {name: value[order.chunk(parts)[part]] for name, value in data(step).items()}
    out = model(mine["x"], mine["t"], {name: mine[name] for name in ("text", "pooled")})
    return (out.float() - mine["target"]).square().mean()


def optimizer_of(kind: str) -> OptimizerFactory:
    """SGD to compare: AdamW would turn gradients that are zero but for rounding into steps of full size."""
    if kind == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def run_of(
    layout: Layout,
    *,
    dtype: str,
    optim: str,
    accumulation: int = 1,
    seed: int = 0,
    lora: bool = False,
    loss: LossOf = loss_of,
) -> TrainingRun:
    """Ready to step."""
    return TrainingRun(
        layout.section,
        dtype=dtype,
        grad_clip=CLIP,
        model=build_model(seed, lora=lora),
        optimizer=optimizer_of(optim),
        loss_of=loss,
        accumulation=accumulation,
    )


def reference(*, lora: bool) -> Track:
    """Plain torch on the joined batch, in float32."""
    model = build_model(0, lora=lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, steps = optimizer_of("sgd")(list(trained.values())), []
    for step in range(STEPS):
        loss = loss_of(model, step, 0, 1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
        assert norm > CLIP, f"step {step}: clipping is not active, norm {norm}"
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm))
    return Track(steps, {name: p.detach() for name, p in trained.items()})


def track(layout: Layout, key: Key) -> Track:
    """Train; the weights are on rank 0."""
    loss = partial(loss_of, shuffle=key.shuffle)
    run = run_of(layout, dtype=key.dtype, optim="sgd", accumulation=key.accumulation, lora=key.lora, loss=loss)
    return Track([run.step(step) for step in range(STEPS)], run.whole()["master"])


def keys_of(layout: Layout, world: int) -> list[Key]:
    """What a layout runs in a launch; in one process bfloat16 also in all orders, to see how far these are apart."""
    keys = []
    for dtype in layout.dtypes:
        orders = [(accumulation, 0) for accumulation in ACCUMULATIONS]
        if world == 1 and dtype == "bf16":
            orders = list(product(CUTS, SHUFFLES))
        for lora in (False, True) if layout.lora else (False,):
            keys += [Key(layout.name, dtype, lora, *order) for order in orders]
    return keys


def read_checkpoints(layout: Layout, folders: Sequence[Path]) -> dict[tuple[str, int, str], bool]:
    """One after the other, into a run that started elsewhere. Returns: whether every bit arrived, on all ranks."""
    run, found = run_of(layout, dtype=layout.dtypes[0], optim="adamw", seed=1), {}
    ema = EMA(run.booster, 0.5)
    manager = run.checkpoints(folders[0], ema)  # one for all: it makes a process group
    for folder in folders:
        manager.load(next(folder.glob("epoch*-global_step2")))
        truth, loss = torch.load(folder / "truth.pt"), run.loss(2)
        exact = is_part_of(run, truth["whole"], ema) and abs(loss / truth["loss"] - 1) < LOSS_ROUNDING
        world, _, written_as = folder.name.partition(" ")
        found[written_as, int(world), layout.name] = everywhere(exact)
    return found


def work(folder: Path, only: Sequence[str]) -> None:
    """What each process of a launch does."""
    process = runtime.start()
    world, found = process.world_size, Found()
    usable = []
    for layout in (each for each in chosen(only) if world % each.multiple == 0):
        try:
            build(layout.section, BOOSTERS, where="booster", device=CPU, dtype=layout.dtypes[0], grad_clip=CLIP)
        except ValueError as problem:  # a package is not installed; the table says so
            found.absent[layout.name] = str(problem)
            continue
        usable.append(layout)
        for key in keys_of(layout, world):
            with given_back(layout):
                found.tracks[key] = track(layout, key)
    said(f"{world} processes: {len(found.tracks)} runs")
    for layout in usable:
        with given_back(layout):
            run = run_of(layout, dtype=layout.dtypes[0], optim="adamw")
            saves(run, folder / f"{world} {layout.name}")
            del run
    folders = sorted(path.parent for path in folder.glob("*/truth.pt"))
    for i, layout in enumerate(usable):
        own = f"{world} {layout.name}"
        mine = [f for j, f in enumerate(folders) if world == WORLDS[0] or (i + j) % EVERY == 0 or f.name == own]
        with given_back(layout):
            found.moves |= read_checkpoints(layout, mine)
    said(f"{world} processes: {len(usable)} checkpoints written, {len(found.moves)} read")
    if process.is_main:
        torch.save(found, folder / f"world{world}.pt")
    runtime.finish()


def said(text: str) -> None:
    """Printed by rank 0, with how long the process has worked."""
    if dist.get_rank() == 0:
        print(f"{text}; {time.process_time():.0f} s of this process's CPU", flush=True)


def given_back(layout: Layout) -> Any:
    """Process groups of a run; DeepSpeed uses its own again."""
    return groups_given_back(keeps_groups=layout.section["type"] == "deepspeed")


def chosen(only: Sequence[str]) -> list[Layout]:
    """Layouts whose names hold one of these words, and what these are in one process; all without words."""
    named = [layout for layout in LAYOUTS if not only or any(word in layout.name for word in only)]
    return [layout for layout in LAYOUTS if layout in named or layout.name in {each.alone for each in named}]


def launch(world: int, folder: Path, only: Sequence[str]) -> Found:
    """Run `work` in that many processes, unless they have left their findings; what they print is shown as it comes."""
    if (folder / f"world{world}.pt").exists():
        return torch.load(folder / f"world{world}.pt", weights_only=False)
    for left in folder.glob(f"{world} *"):
        shutil.rmtree(left)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [*start, __file__, "--work", str(folder), *(["--only", *only] if only else [])]
    subprocess.run(command, env=environment, check=True)
    return torch.load(folder / f"world{world}.pt", weights_only=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "boosters.md")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="numbers of processes; 1 is added")
    parser.add_argument("--only", nargs="+", default=[], help="words; layouts whose names hold one of them")
    parser.add_argument("--folder", type=Path, help="keep all in it; go on from a run that was cut short")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.only)
        # A thread of gloo may still hold a tensor while the interpreter ends, and would abort the process.
        os._exit(0)
    torch.set_num_threads(1)
    began = time.monotonic()
    worlds = [*(world for world in WORLDS if world in arguments.worlds and world != 1), 1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = {world: launch(world, folder, arguments.only) for world in worlds}
    truth = {lora: reference(lora=lora) for lora in (False, True)}
    put_into(arguments.out, tables(found, truth, chosen(arguments.only), ACCUMULATIONS, cuts=CUTS, shuffles=SHUFFLES))
    wrong = [move for each in found.values() for move, exact in each.moves.items() if not exact]
    print(f"{arguments.out}: written after {time.monotonic() - began:.0f} s")
    if wrong:
        raise SystemExit(f"{len(wrong)} checkpoints did not arrive as they were, e.g. {wrong[0]}")


if __name__ == "__main__":
    main()
