"""Tell what training would see of a table of clips, before any GPU time.

python tools/doctor.py TABLE --config CONFIG [--world-size N ...] [--decode N] [--files N] [--key value ...]

Prints, and writes as one html page: what becomes of every clip in an epoch and why (too few frames, too small, lost
draw, left over, quarantined), samples and batches per bucket, steps per epoch, what is wrong with clips (files that
are missing or cannot be read, empty or repeated captions, absurd rates and sizes), and which number to change.

--decode N        read N clips of the plan as training does (64); --files N: look for the files of N clips (1000000).
                  Both are random samples, drawn from the config's seed, where there are more.
--quarantine A,B  kinds of clips for quarantine.csv, which `--dataset.quarantine FILE` keeps out of every plan.

TABLE is dataset.data_path; --key value overrides the config as in training. Written to --output (outputs/doctor/TABLE):
report.html, offenders.csv (row, path, reason, numbers), quarantine.csv.
Exit status: 0; 1 if training would see nothing or stop at once; 2 if the command line, config or table is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table as Grid2D

from opensora_like.config import config_text, read_config
from opensora_like.datasets import diagnosis as dx
from opensora_like.datasets.cost import Grid
from opensora_like.evaluation.doctor_page import Findings, share, write_page
from opensora_like.models.base import Autoencoder
from opensora_like.registry import nearest
from opensora_like.settings import RunConfig
from opensora_like.training import resources
from opensora_like.training.batch_size import ranks_per_sample, with_batch_sizes
from opensora_like.training.cached import open_cached
from opensora_like.training.data import build_dataset
from opensora_like.training.data_checks import bucket_errors, bucket_notes, build_outline, steps_of
from opensora_like.training.held_out_loss import hold_out

WORLDS = (1, 2, 4, 8, 16, 32, 64)  # times the ranks that share a sample
MAX_LISTED = 100_000  # rows of one reason in offenders.csv
ORDINARY = ("kept", "batch_remainder", "lost_draw", "held_out")  # outcomes that nothing is wrong with


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table")
    parser.add_argument("--config", required=True)
    parser.add_argument("--world-size", type=int, nargs="+")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=0, help="processes that --decode uses")
    parser.add_argument("--quarantine", default=",".join(dx.HARMFUL))
    parser.add_argument("--output", type=Path)
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Args: arguments: of the command line, None for this process'. Returns: the exit code."""
    args, overrides = parse_arguments(arguments)
    try:
        return run(args, overrides)
    except (ValueError, FileNotFoundError) as problem:
        print(f"doctor.py: {problem}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    kinds = args.quarantine.split(",") if args.quarantine else []
    for kind in kinds:
        if kind not in dx.DEFECTS:
            raise ValueError(f"--quarantine {kind!r}: {nearest(kind, dx.DEFECTS)}")
    for name in ("decode", "files", "workers", "epoch"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be 0 or more")
    if too_few := [world for world in args.world_size or () if world < 1]:
        raise ValueError(f"--world-size {too_few[0]} must be 1 or more")
    if any(text.replace("-", "_").lstrip("_").startswith("dataset.data_path") for text in overrides):
        raise ValueError("the table is given twice: as the first argument and as --dataset.data-path; remove one")
    cfg = read_config(args.config, [*overrides, "--dataset.data-path", args.table], schema=RunConfig).config
    outline = build_outline(cfg, open_cached(cfg))
    findings = examine(args, cfg, outline.autoencoder, resources.grid_of(*outline))
    output = args.output or Path("outputs/doctor") / Path(args.table).stem
    files = write_lists(output, findings, kinds)
    write_page(output / "report.html", findings, files=files, config=config_text(cfg))
    print_findings(Console(width=None if sys.stdout.isatty() else 140), findings, output)
    return 1 if findings.verdicts else 0


def examine(args: argparse.Namespace, cfg: RunConfig, autoencoder: Autoencoder, grid: Grid) -> Findings:
    """Look at everything that can be looked at without the models' weights."""
    whole_batches = dataclasses.replace(cfg, global_batch_size=None)  # that one is about steps, see `steps_of`
    dataset = build_dataset(with_batch_sizes(whole_batches, ranks_per_sample(cfg.booster)), multiple=grid.spatial)
    whole = dataset.table
    hold_out(cfg, dataset)
    found = dx.diagnose(dataset, seed=cfg.seed, epoch=args.epoch, whole=whole)
    known = np.flatnonzero(found.outcomes != dx.OUTCOMES.index("quarantined"))
    defects = {**dx.check_numbers(dataset), **dx.check_captions(dataset)}
    if args.files and dx.opens_files(dataset):
        rows = dx.choose_rows(known, args.files, seed=cfg.seed, purpose="doctor.files")
        defects["missing_file"] = dx.check_files(dataset, rows)
    if args.decode:
        there = found.ids >= 0
        there[defects["missing_file"].rows if "missing_file" in defects else []] = False
        rows = dx.choose_rows(np.flatnonzero(there), args.decode, seed=cfg.seed, purpose="doctor.decode")
        defects["undecodable"] = dx.check_reading(found, rows, num_workers=args.workers)
    defects = {name: defects[name] for name in dx.DEFECTS if name in defects}
    split = ranks_per_sample(cfg.booster)
    worlds = args.world_size or [split * n for n in WORLDS]
    steps = [steps_of(cfg, world, found.num_micro_batches) for world in worlds]
    verdicts = [found.why_empty] if found.why_empty else []
    if found.num_micro_batches and not any(s.steps for s in steps):
        verdicts.append("no step: " + next((s.problem for s in steps if s.problem), "too few micro-batches"))
    verdicts += bucket_errors(dataset.buckets, autoencoder)
    verdicts += dx.nothing_readable(defects)
    options = {**cfg.booster, **(cfg.booster.get("plugin_config") or {})}
    notes = bucket_notes(dataset.buckets, autoencoder, grid, sp_size=int(options.get("sp_size") or 1))
    bad = [len(defects[n].rows) / max(defects[n].num_checked, 1) for n in dx.HARMFUL[:2] if n in defects]
    if sum(bad) > cfg.max_bad_fraction and not verdicts:
        notes.insert(0, f"about {sum(bad):.1%} of the clips cannot be read and max_bad_fraction={cfg.max_bad_fraction} "
                     "stops a run there: give --dataset.quarantine quarantine.csv, or correct the table")  # fmt: skip
    return Findings(found, defects, steps, verdicts, [*notes, *dataset.table.notes], args.table)


def write_lists(output: Path, findings: Findings, kinds: list[str]) -> dict[str, str]:
    """Write offenders.csv and quarantine.csv. Returns: name -> what it is."""
    found, defects = findings.diagnosis, findings.defects
    details = {name: defect.details for name, defect in defects.items()}
    reasons = {name: np.flatnonzero(found.outcomes == dx.OUTCOMES.index(name)) for name in found.counts}
    listed = {name: rows for name, rows in reasons.items() if name not in ORDINARY}
    listed |= {name: defect.rows for name, defect in defects.items() if len(defect.rows)}
    cut = [f"{name} ({len(rows)})" for name, rows in listed.items() if len(rows) > MAX_LISTED]
    offenders = {name: rows[:MAX_LISTED] for name, rows in listed.items()}
    number = dx.write_rows(output / "offenders.csv", found, offenders, details)
    kept_out = {name: rows for name, rows in listed.items() if name in (*kinds, "quarantined")}
    total = dx.write_rows(output / "quarantine.csv", found, kept_out, details)
    first = f"; the first {MAX_LISTED} of {', '.join(cut)}" if cut else ""
    use = f"{total} rows, for --dataset.quarantine {output / 'quarantine.csv'}"
    return {"offenders.csv": f"{number} rows with their reasons and numbers{first}", "quarantine.csv": use}


def print_findings(console: Console, findings: Findings, output: Path) -> None:
    found, total = findings.diagnosis, len(findings.diagnosis.outcomes)
    table = _grid(f"{total:,} clips of {findings.table_path}, epoch {found.epoch}", "outcome", "clips", "share", "<")
    for name, number in found.counts.items():
        table.add_row(name, f"{number:,}", share(number, total), found.advice.get(name, ""))
    console.print(table)
    table = _grid("Defects", "defect", "clips", "looked at", "in the plan")
    for name, defect in findings.defects.items():
        table.add_row(name, f"{len(defect.rows):,}", f"{defect.num_checked:,}", f"{findings.in_plan(name):,}")
    console.print(table)
    table = _grid("Buckets", "bucket", "clips", "batch size", "micro-batches", "left over", "ratios")
    for line in found.per_bucket:
        table.add_row(line.name, *(f"{n:,}" for n in (line.clips, *line[2:])))
    console.print(table)
    table = _grid("An epoch", "processes", "data-parallel", "accumulation", "steps", "micro-batches left over", "<")
    for steps in findings.steps:
        table.add_row(*(f"{n:,}" for n in steps[:5]), steps.problem)
    console.print(table)
    for line in findings.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in findings.verdicts:
        console.print(f"training would not run: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"written to {output}: report.html, offenders.csv, quarantine.csv",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _grid(title: str, *names: str) -> Grid2D:
    """A table whose first column is text, as is one named "<"; the others are numbers."""
    table = Grid2D(title=title, title_justify="left")
    for place, name in enumerate(names):
        text = place == 0 or name == "<"
        table.add_column("" if name == "<" else name, justify="left" if text else "right", no_wrap=name != "<")
    return table


if __name__ == "__main__":
    sys.exit(main())
