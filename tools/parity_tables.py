"""The tables of parity_matrix.py in markdown."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
BAR = 1e-5  # of float32, for losses and norms relatively, for weights absolutely
PACKAGES = ("torch", "colossalai", "deepspeed")


class Difference(NamedTuple):
    """Largest ones over the steps: of losses and norms relative, of final weights absolute."""

    loss: float
    norm: float
    weights: float

    def __str__(self) -> str:
        return " / ".join(_short(number) for number in self)


def difference(one: Any, other: Any) -> Difference:
    """Of two tracks."""
    steps = list(zip(one.steps, other.steps, strict=True))
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in steps) for i in (0, 1))
    assert one.weights.keys() == other.weights.keys()
    return Difference(loss, norm, max((one.weights[n] - w).abs().max().item() for n, w in other.weights.items()))


def largest_of_pairs(tracks: Sequence[Any]) -> Difference:
    """The largest differences of any two."""
    return Difference(*map(max, zip(*(difference(a, b) for a, b in combinations(tracks, 2)), strict=True)))


class Matrix:
    """What the launches found, by row and column.

    Args:
        found: number of processes -> what its launch found.
        truth: with LoRA or not -> the track of plain torch in float32.
        cuts, shuffles: micro-batches and sample orders of the runs of one process in bfloat16.
    """

    def __init__(
        self,
        found: Mapping[int, Any],
        truth: Mapping[bool, Any],
        layouts: Sequence[Any],
        accumulations: Sequence[int],
        *,
        cuts: Sequence[int],
        shuffles: Sequence[int],
    ) -> None:
        self.found, self.truth, self.layouts, self.orders = found, truth, layouts, list(product(cuts, shuffles))
        self.columns = [(world, n) for world in sorted(found) for n in accumulations]
        # names of runs are tuples, so that this file knows nothing of their class
        self._tracks = {world: {tuple(k): t for k, t in each.tracks.items()} for world, each in found.items()}

    def rows(self, dtype: str) -> list[tuple[Any, bool]]:
        """(layout, with LoRA), of all that was run."""
        ran = {(k[0], k[2]) for tracks in self._tracks.values() for k in tracks if k[1] == dtype}
        return [(each, lora) for lora in (False, True) for each in self.layouts if (each.name, lora) in ran]

    def cells(self, layout: Any, dtype: str, lora: bool, against: Any) -> list[Difference | None]:
        """One for each column: the difference from the track `against`."""
        tracks = [self._tracks[world].get((layout.name, dtype, lora, n, 0)) for world, n in self.columns]
        return [None if track is None or against is None else difference(track, against) for track in tracks]

    def alone(self, layout: Any, lora: bool, order: tuple[int, int] = (1, 0)) -> Any:
        """The track of the same booster in one process, in bfloat16; None where it was not run.

        Args:
            order: micro-batches, and order of the samples.
        """
        return self._tracks[1].get((layout.alone, "bf16", lora, *order))

    def spread(self, layout: Any, lora: bool) -> Difference | None:
        """The largest differences of any two runs of one process in bfloat16 that add gradients in other orders."""
        tracks = [self.alone(layout, lora, order) for order in self.orders]
        return None if any(track is None for track in tracks) else largest_of_pairs(tracks)

    def left_out(self) -> list[float]:
        """By how much each run of one process but the joined one is outside the spread of all others: 1 is its edge."""
        found = []
        for layout, lora in self.rows("bf16"):
            tracks = [self.alone(layout, lora, order) for order in self.orders]
            if layout.name != layout.alone or any(track is None for track in tracks):
                continue
            for i in range(1, len(tracks)):
                spread = largest_of_pairs([track for j, track in enumerate(tracks) if j != i])
                found.append(max(over_spread([difference(tracks[i], tracks[0])], spread)))
        return found


def float32_table(matrix: Matrix) -> list[str]:
    """Against plain torch."""
    rows = [(each, lora, matrix.cells(each, "fp32", lora, matrix.truth[lora])) for each, lora in matrix.rows("fp32")]
    lines = _table(_heads(matrix), [[_name(each, lora), *cells] for each, lora, cells in rows])
    there = [cell for _, _, cells in rows for cell in cells if cell is not None]
    largest = Difference(*(max(column) for column in zip(*there, strict=True)))
    over = [_name(each, lora) for each, lora, cells in rows if any(cell and max(cell) > BAR for cell in cells)]
    told = f"{len(rows) - len(over)} of {len(rows)} rows are within what is asked; the largest of all: {largest}."
    return [*lines, "", f"{told} Not within: {', '.join(over)}." if over else told]


def bfloat16_table(matrix: Matrix) -> list[str]:
    """Against one process, beside the spread of one process and its distance from float32."""
    lines, over, measured = [], [], 0
    for layout, lora in matrix.rows("bf16"):
        joined, spread = matrix.alone(layout, lora), matrix.spread(layout, lora)
        cells = matrix.cells(layout, "bf16", lora, joined)
        rounding = None if joined is None else difference(joined, matrix.truth[lora])
        ratio = None if spread is None else over_spread([cell for cell in cells if cell is not None], spread)
        lines.append([_name(layout, lora), *cells, spread, ratio, rounding])
        measured += ratio is not None
        if ratio is not None and max(ratio) > 1:
            over.append(_name(layout, lora))
    heads = [*_heads(matrix), "spread of one process", "largest / spread", "one process against float32"]
    told = f"{measured - len(over)} of {measured} rows are within their spread in all three numbers"
    alone = matrix.left_out()
    outside = [ratio for ratio in alone if ratio > 1]
    said = f" Of the one-process runs themselves, {len(outside)} of {len(alone)} are outside the spread of the others"
    said += f", by a factor of {max(outside):.1f} at most." if outside else "."
    return [*_table(heads, lines), "", (f"{told}; not: {', '.join(over)}." if over else f"{told}.") + said]


class Ratio(NamedTuple):
    """Of differences over others, number by number."""

    loss: float
    norm: float
    weights: float

    def __str__(self) -> str:
        return " / ".join(f"{number:.1f}" for number in self)


def over_spread(cells: Sequence[Difference], spread: Difference) -> Ratio:
    """The largest cell over the spread, for each number."""
    return Ratio(*(max(column) / limit for column, limit in zip(zip(*cells, strict=True), spread, strict=True)))


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
    cuts: Sequence[int],
    shuffles: Sequence[int],
) -> str:
    """All of it; see `Matrix`."""
    matrix = Matrix(found, truth, layouts, accumulations, cuts=cuts, shuffles=shuffles)
    kinds = [f"{name} {_version(name)}" for name in PACKAGES]
    lines = [
        f"Measured on {datetime.date.today()} by `python tools/parity_matrix.py`: python {platform.python_version()},"
        f" {', '.join(kinds)}, {platform.machine()} CPU, gloo; {len(truth[False].steps)} steps of SGD with momentum,"
        f" clipping active in each, {max(cuts)} samples in each global batch. A cell is the largest difference of"
        " losses (relative) / of gradient norms (relative) / of final weights (absolute).",
        "",
        f"**float32**, against plain torch in one process on the joined batch; {_short(BAR)} is asked for each number:",
        "",
        *float32_table(matrix),
        "",
        "**bfloat16**, against the same booster in one process on the joined batch. The spread is the largest"
        f" difference of any two of {len(matrix.orders)} runs of the same booster in one process on the same batches:"
        f" in {list(cuts)} micro-batches, each with the samples in {len(shuffles)} orders, which moves the places where"
        " gradients are rounded as more processes do. Tensor parallelism and rings round within a forward besides,"
        " where no order of one process does.",
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


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-").replace("0e+00", "0")


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
