"""The findings of tools/doctor.py as one static html page: what becomes of the clips, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora_like.datasets.diagnosis import HARMFUL, Defect, Diagnosis, Steps, usable_frames
from opensora_like.evaluation.curves import INK, MEAN, RAW, themed_svg
from opensora_like.evaluation.report import Section, _section, write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_EXAMPLES = 12  # rows shown of each defect
MAX_BUCKETS = 40  # bars of the plot of buckets
FRAME_BINS, SIZE_BINS = 60, 60


@dataclass(frozen=True, eq=False)
class Findings:
    """All that is to be told of a table.

    Args:
        defects: by the names of `diagnosis.DEFECTS`; those that were not looked for are left out.
        verdicts: why training would see nothing or stop; empty if it would train.
        warnings: what it would train with, and should not.
        table_path: as the user wrote it.
    """

    diagnosis: Diagnosis
    defects: Mapping[str, Defect]
    steps: Sequence[Steps]
    verdicts: Sequence[str]
    warnings: Sequence[str]
    table_path: str

    def in_plan(self, name: str) -> int:
        """How many rows of a defect the epoch trains on."""
        return int((self.diagnosis.outcomes[self.defects[name].rows] == 0).sum())


def write_page(path: str | Path, findings: Findings, *, files: Mapping[str, str], config: str) -> Path:
    """Write the page. It needs no network and no other file.

    Args:
        files: what was written beside it: name -> what it is.
        config: the resolved config as text.

    Returns: `path`.
    """
    diagnosis = findings.diagnosis
    num_rows, kept = len(diagnosis.outcomes), diagnosis.counts.get("kept", 0)
    harmful = np.unique(np.concatenate([d.rows for n, d in findings.defects.items() if n in HARMFUL] or [[]]))
    summary = {
        "clips": f"{num_rows:,}",
        f"trained on in epoch {diagnosis.epoch}": f"{kept:,} ({share(kept, num_rows)})",
        "micro-batches": f"{diagnosis.num_micro_batches:,}",
        "with a defect, as far as looked": f"{len(harmful):,}",
        "verdict": "training would not run" if findings.verdicts else "training would run",
    }
    sections: list[Section] = []
    if findings.verdicts:
        sections.append(_List("Training would not run", findings.verdicts, kind="bad"))
    if findings.warnings:
        sections.append(_List("Warnings", findings.warnings))
    sections += [
        _Outcomes(diagnosis),
        _Defects(findings),
        _Plots(diagnosis),
        _Buckets(diagnosis),
        _StepTable(findings.steps),
    ]
    if files:
        sections.append(_List("Files", [f"{name}: {what}" for name, what in files.items()]))
    title = f"What training sees of {Path(findings.table_path).name}"
    return write_report(path, title=title, summary=summary, sections=sections, config=config)


def share(part: int, whole: int) -> str:
    """In percent; only all is 100 % and only nothing is 0 %."""
    percent = 100 * part / max(whole, 1)
    return f"{min(percent, 99.9) if part < whole else percent:.1f} %" if percent >= 0.1 or not part else "< 0.1 %"


@dataclass(frozen=True)
class _List:
    """Sentences, which may have several lines. Args: kind: a class of the page's style."""

    title: str
    lines: Sequence[str]
    kind: str = ""

    def html(self) -> str:
        items = "".join(f'<li class="{self.kind}">{escape(line).replace(chr(10), "<br>")}</li>' for line in self.lines)
        return _section(self.title, "", f"<ul>{items}</ul>")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_text: int = 1) -> str:
    """A table of escaped cells; the first `num_text` columns and the last are text, the others numbers."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        kinds = ["" if i < num_text or i == len(row) - 1 else ' class="number"' for i in range(len(row))]
        body += "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
    return f'<table class="scores"><tr>{top}</tr>{body}</table>'


@dataclass(frozen=True)
class _Outcomes:
    """What becomes of the rows; the counts sum to the rows of the table."""

    diagnosis: Diagnosis

    def html(self) -> str:
        counts, total = self.diagnosis.counts, len(self.diagnosis.outcomes)
        rows = []
        for name, number in counts.items():
            bar = f'<div class="bar"><div style="width:{100 * number / total:.1f}%"></div></div>'
            said = "in the plan of training" if name == "kept" else self.diagnosis.advice.get(name, "")
            rows.append([escape(name), f"{number:,}", share(number, total), bar, escape(said)])
        note = f"Every row of the table once, epoch {self.diagnosis.epoch}."
        return _section("What becomes of the clips", note, _grid(["outcome", "clips", "", "", ""], rows))


@dataclass(frozen=True)
class _Defects:
    """What is wrong with rows, whether they are in the plan or not."""

    findings: Findings

    def html(self) -> str:
        rows, examples = [], ""
        for name, defect in self.findings.defects.items():
            kind = "harmful" if name in HARMFUL else "to know"
            numbers = [f"{len(defect.rows):,}", f"{defect.num_checked:,}", f"{self.findings.in_plan(name):,}"]
            rows.append([escape(name), *numbers, kind])
            if len(defect.rows) and name in HARMFUL:
                examples += self._examples(name, defect)
        note = "A clip may have several."
        head = ["defect", "clips", "of so many looked at", "in the plan", ""]
        return _section("What is wrong with clips", note, _grid(head, rows) + examples)

    def _examples(self, name: str, defect: Defect) -> str:
        table = self.findings.diagnosis.dataset.table
        shown = defect.rows[:MAX_EXAMPLES]
        lines = []
        for row, path in zip(shown.tolist(), table.paths(shown), strict=True):
            numbers = (
                f"{table.width[row]} x {table.height[row]}, {table.num_frames[row]} frames, {table.fps[row]:g} fps"
            )
            lines.append(f"row {row}  {path}  {defect.details.get(row, numbers)}")
        which = "all" if len(shown) == len(defect.rows) else f"the first {len(shown)} of {len(defect.rows):,}"
        text = escape("\n".join(lines))
        return f"<details><summary>{escape(name)}: {which}</summary><pre>{text}</pre></details>"


@dataclass(frozen=True)
class _Plots:
    """Distributions of the table, and the buckets in them."""

    diagnosis: Diagnosis

    def html(self) -> str:
        which = f"the first {MAX_BUCKETS} buckets" if len(self.diagnosis.per_bucket) > MAX_BUCKETS else "each bucket"
        figures = [
            ("loss buckets", f"clips of {which}: trained on, and on top of that left over", self._buckets, (9, 3.4)),
            ("frames", "frames that clips keep at fps_max; lines are bucket lengths", self._frames, (4.4, 2.6)),
            ("sizes", "size of clips, the side of a square of as many pixels; lines: smallest that a resolution takes",
             self._sizes, (4.4, 2.6)),
        ]  # fmt: skip
        body = "".join(
            f'<figure class="curve {kind}"><figcaption>{escape(caption)}</figcaption>'
            f"{themed_svg(draw, name=kind, size=size)}</figure>"
            for kind, caption, draw, size in figures
        )
        return _section("The table beside its buckets", "", f'<div class="curves">{body}</div>')

    def _frames(self, axes: Axes) -> None:
        frames = usable_frames(self.diagnosis.dataset)
        _bars(axes, frames, FRAME_BINS)
        lengths = {s.num_frames for s in self.diagnosis.dataset.buckets.shapes}
        _lines(axes, lengths, most=float(frames.max(initial=1)))
        axes.set_xlabel("frames")

    def _sizes(self, axes: Axes) -> None:
        table = self.diagnosis.dataset.table
        sides = np.sqrt(np.asarray(table.height, np.float64) * np.asarray(table.width, np.float64))
        _bars(axes, sides, SIZE_BINS)
        smallest = {r.smallest**0.5 for r in self.diagnosis.dataset.buckets.resolutions}
        _lines(axes, smallest, most=float(sides.max()))
        axes.set_xlabel("pixels")

    def _buckets(self, axes: Axes) -> None:
        lines = self.diagnosis.per_bucket[:MAX_BUCKETS]
        places = np.arange(len(lines))
        axes.bar(places, [line.clips for line in lines], color=RAW, width=0.8)
        axes.bar(places, [line.clips - line.left_over for line in lines], color=MEAN, width=0.8)
        axes.set_xlim(-1, max(len(lines), 8))
        axes.set_xticks(places, [line.name for line in lines], rotation=60, ha="right", fontsize=7)


def _bars(axes: Axes, values: np.ndarray, num_bins: int) -> None:
    """A histogram on a logarithmic scale, cut at the 99.9th percentile so that one slip does not squeeze the rest."""
    limit = float(np.quantile(values, 0.999)) if len(values) > 1000 else float(values.max(initial=1))
    edges = np.linspace(0, max(limit, 1.0), num_bins + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=RAW)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)


def _lines(axes: Axes, places: set, *, most: float) -> None:
    for place in sorted(p for p in places if p <= most * 1.2 + 1):
        axes.axvline(place, color=INK, linewidth=0.5, alpha=0.5)


@dataclass(frozen=True)
class _Buckets:
    """Samples and batches per bucket."""

    diagnosis: Diagnosis

    def html(self) -> str:
        rows = [
            [escape(b.name), *(f"{n:,}" for n in (b.clips, b.batch_size, b.micro_batches, b.left_over)), str(b.ratios)]
            for b in self.diagnosis.per_bucket
        ]
        empty = len({self.diagnosis.dataset.buckets.name(b) for b in range(len(self.diagnosis.dataset.buckets))})
        note = f"Aspect ratios summed. {empty - len(rows)} of {empty} buckets have no clip and are left out."
        head = ["bucket", "clips", "batch size", "micro-batches", "left over", "ratios with clips"]
        return _section("Buckets", note, _grid(head, rows))


@dataclass(frozen=True)
class _StepTable:
    """Steps of an epoch by number of processes."""

    steps: Sequence[Steps]

    def html(self) -> str:
        rows = [
            [f"{s.world_size:,}", f"{s.dp_size:,}", f"{s.accumulation:,}", f"{s.steps:,}", f"{s.unused:,}",
             escape(s.problem)]
            for s in self.steps
        ]  # fmt: skip
        head = ["processes", "data-parallel", "accumulation", "steps of an epoch", "micro-batches left over", ""]
        return _section("Steps", "", _grid(head, rows, num_text=0))
