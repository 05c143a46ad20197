"""The tables of parity_matrix.py in markdown."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
PACKAGES = ("torch", "colossalai", "deepspeed")


class Difference(NamedTuple):
    """Largest ones over the steps: of losses and norms relative, of final weights absolute."""

    loss: float
    norm: float
    weights: float

    def __str__(self) -> str:
        return " / ".join(f"{number:.0e}".replace("e-0", "e-").replace("0e+00", "0") for number in self)


def difference(one: Any, other: Any) -> Difference:
    """Of two tracks."""
    steps = list(zip(one.steps, other.steps, strict=True))
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in steps) for i in (0, 1))
    assert one.weights.keys() == other.weights.keys()
    return Difference(loss, norm, max((one.weights[n] - w).abs().max().item() for n, w in other.weights.items()))


class Matrix:
    """What the launches found, by row and column.

    Args:
        found: number of processes -> what its launch found.
        truth: with LoRA or not -> the track of plain torch in float32.
        orders: micro-batches of the runs of one process in bfloat16.
    """

    def __init__(
        self,
        found: Mapping[int, Any],
        truth: Mapping[bool, Any],
        layouts: Sequence[Any],
        accumulations: Sequence[int],
        *,
        orders: Sequence[int],
    ) -> None:
        self.found, self.truth, self.layouts, self.orders = found, truth, layouts, orders
        self.columns = [(world, n) for world in sorted(found) for n in accumulations]
        # names of runs are tuples, so that this file knows nothing of their class
        self._tracks = {world: {tuple(k): t for k, t in each.tracks.items()} for world, each in found.items()}

    def rows(self, dtype: str) -> list[tuple[Any, bool]]:
        """(layout, with LoRA), of all that was run."""
        ran = {(k[0], k[2]) for tracks in self._tracks.values() for k in tracks if k[1] == dtype}
        return [(each, lora) for lora in (False, True) for each in self.layouts if (each.name, lora) in ran]

    def cells(self, layout: Any, dtype: str, lora: bool, against: Any) -> list[Difference | None]:
        """One for each column: the difference from the track `against`."""
        tracks = [self._tracks[world].get((layout.name, dtype, lora, n)) for world, n in self.columns]
        return [None if track is None or against is None else difference(track, against) for track in tracks]

    def alone(self, layout: Any, lora: bool, accumulation: int) -> Any:
        """The track of the same booster in one process, in bfloat16; None where it was not run."""
        return self._tracks[1].get((layout.alone, "bf16", lora, accumulation))

    def spread(self, layout: Any, lora: bool) -> Difference | None:
        """The largest differences of any two runs of one process in bfloat16 that add gradients in other orders."""
        tracks = [self.alone(layout, lora, n) for n in self.orders]
        if any(track is None for track in tracks):
            return None
        return Difference(*map(max, zip(*(difference(a, b) for a, b in combinations(tracks, 2)), strict=True)))


def float32_table(matrix: Matrix) -> list[str]:
    """Against plain torch."""
    rows = [(each, lora, matrix.cells(each, "fp32", lora, matrix.truth[lora])) for each, lora in matrix.rows("fp32")]
    return _table(_heads(matrix), [[_name(each, lora), *cells] for each, lora, cells in rows])


def bfloat16_table(matrix: Matrix) -> list[str]:
    """Against one process, beside the spread of one process and its distance from float32."""
    lines, furthest = [], 0.0
    for layout, lora in matrix.rows("bf16"):
        joined, spread = matrix.alone(layout, lora, 1), matrix.spread(layout, lora)
        cells = matrix.cells(layout, "bf16", lora, joined)
        rounding = None if joined is None else difference(joined, matrix.truth[lora])
        lines.append([_name(layout, lora), *cells, spread, rounding])
        if spread is not None:
            ratios = [a / b for cell in cells if cell is not None for a, b in zip(cell, spread, strict=True) if b]
            furthest = max([furthest, *ratios])
    heads = [*_heads(matrix), "spread of one process", "one process against float32"]
    return [*_table(heads, lines), "", f"The largest number of a row over its spread: {furthest:.1f}."]


def moves_table(found: Mapping[int, Any]) -> list[str]:
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


def tables(
    found: Mapping[int, Any],
    truth: Mapping[bool, Any],
    layouts: Sequence[Any],
    accumulations: Sequence[int],
    *,
    orders: Sequence[int],
) -> str:
    """All of it; see `Matrix`."""
    matrix = Matrix(found, truth, layouts, accumulations, orders=orders)
    kinds = [f"{name} {_version(name)}" for name in PACKAGES]
    lines = [
        f"Measured on {datetime.date.today()} by `python tools/parity_matrix.py`: python {platform.python_version()},"
        f" {', '.join(kinds)}, {platform.machine()} CPU, gloo; {len(truth[False].steps)} steps of SGD with momentum,"
        f" clipping active in each, {max(orders)} samples in each global batch. A cell is the largest difference of"
        " losses (relative) / of gradient norms (relative) / of final weights (absolute).",
        "",
        "**float32**, against plain torch in one process on the joined batch:",
        "",
        *float32_table(matrix),
        "",
        "**bfloat16**, against the same booster in one process on the joined batch. The spread is the"
        f" largest difference of any two one-process runs that add gradients in other orders: of {list(orders)}"
        " micro-batches.",
        "",
        *bfloat16_table(matrix),
        "",
        "**Checkpoints**, written after two steps of AdamW in each layout above and read in each on 2"
        " processes; on 4 and on 1 each layout reads its own and every fourth of all others so far. Exact means"
        " every bit of masters, optimizer state and average, and the loss that goes with them. All are written in"
        " float32, but for those that have bfloat16 only.",
        "",
        *moves_table(found),
    ]
    absent = {f"- {name} was not run: {why}" for each in found.values() for name, why in each.absent.items()}
    return "\n".join([*lines, "", *sorted(absent)]).rstrip()


def _heads(matrix: Matrix) -> list[str]:
    return [f"{world} proc., acc. {accumulation}" for world, accumulation in matrix.columns]


def _name(layout: Any, lora: bool) -> str:
    return f"{layout.name}, LoRA" if lora else layout.name


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return lines + ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]


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
