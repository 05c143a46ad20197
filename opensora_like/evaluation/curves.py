"""Read the metrics of a run and draw them as svg that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# key in metrics.jsonl -> heading
PANELS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "loss_generator": "loss of the generator",
    "loss_critic": "loss of the critic",
    "grad_norm_generator": "gradient norm of the generator",
    "grad_norm_critic": "gradient norm of the critic",
    "samples_per_second": "samples per second",
    "data_wait": "share of the time spent waiting for data",
}
MAX_POINTS = 2000  # of a curve; of more, the least and the greatest of each stretch are drawn, so no spike is lost
LOG_KEYS = ("loss", "grad_norm", "grad_norm_generator", "grad_norm_critic")
LOG_RATIO = 10  # these are drawn on a logarithmic scale if their values span more than this
# matplotlib wants colours, the page wants to choose them: these stand for css variables until the svg is done
_INKS = {
    "#010203": "var(--ink)",
    "#010204": "var(--grid)",
    "#010205": "var(--raw)",
    "#010206": "var(--mean)",
    "#010207": "var(--soft)",
    "#010208": "var(--other)",
}
INK, GRID, RAW, MEAN, SOFT, OTHER = _INKS


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics file as columns.

    Args:
        steps: float64 [N], rising; rows with the same step are one, in which the last value of a key counts.
        columns: float64 [N] by key, NaN where a row has no such number.
        is_cut: the file's last line was cut off and is left out.
    """

    name: str
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    is_cut: bool

    @property
    def num_rows(self) -> int:
        return len(self.steps)

    def finite(self, key: str) -> np.ndarray:
        """The finite values of a column; empty if there is no such column."""
        values = self.columns.get(key, np.empty(0))
        return values[np.isfinite(values)]


def read_metrics(path: str | Path) -> Metrics:
    """Read ``metrics.jsonl``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line, other than a last one without its end, is not a json object with a number `step`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"metrics {str(path)!r} do not exist; was the run started with this folder?")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    rows: dict[float, dict] = {}
    is_cut = False
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as problem:
            if number == len(lines) - 1 and not text.endswith("\n"):
                is_cut = True
                break
            raise ValueError(
                f"{str(path)!r} line {number + 1} is not an object with a step: {line[:80]!r}"
            ) from problem
        rows.setdefault(step, {}).update(row)  # a step may have a row of training and one of validation
    steps = sorted(rows)
    keys = sorted({key for row in rows.values() for key in row} - {"step"})
    columns = {key: np.array([_number(rows[step].get(key)) for step in steps], dtype=float) for key in keys}
    return Metrics(path.name, np.array(steps), columns, is_cut)


def _number(value: object) -> float:
    """NaN for what is missing or no number; "nan" and "inf" are written as text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the up to `width` values around each one; values that are not finite are left out of it."""
    kernel = np.ones(width)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")
    count = np.convolve(known.astype(float), kernel, mode="full")
    first = width // 2
    with np.errstate(invalid="ignore"):
        return (total / np.where(count > 0, count, np.nan))[first : first + len(values)]


def thin(values: np.ndarray, max_points: int) -> np.ndarray:
    """Which points to draw: all, or the least and the greatest of each of ``max_points / 2`` stretches."""
    if len(values) <= max_points:
        return np.arange(len(values))
    chosen = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), max_points // 2):
        known = stretch[np.isfinite(values[stretch])]
        if len(known):
            chosen |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
        else:
            chosen.add(int(stretch[0]))  # keeps the gap
    return np.array(sorted(chosen))


def speed_rows(metrics: Metrics) -> dict[str, str]:
    """What was measured of the run's speed, by name; empty if nothing was."""
    shown = {
        "samples per second (median)": ("samples_per_second", np.median, "{:.3g}"),
        "seconds per step (median)": ("step_seconds", np.median, "{:.3g}"),
        "share of the time spent waiting for data (mean)": ("data_wait", np.mean, "{:.1%}"),
        "peak memory, GiB": ("peak_gib", np.max, "{:.3g}"),
    }
    return {
        name: template.format(of(metrics.finite(key)))
        for name, (key, of, template) in shown.items()
        if metrics.finite(key).size
    }


def curves_svg(metrics: Metrics) -> str:
    """One svg figure per known column that has a finite value, as html."""
    return "".join(
        f'<figure class="curve {key}"><figcaption>{title}{", log scale" if _is_log(metrics, key) else ""}</figcaption>'
        f"{_panel(metrics, key)}</figure>"
        for key, title in PANELS.items()
        if metrics.finite(key).size
    )


def mean_width(num_rows: int) -> int:
    """How many rows the running mean covers: one in twenty, an odd number."""
    return max(1, num_rows // 20) | 1


def _is_log(metrics: Metrics, key: str) -> bool:
    finite = metrics.finite(key)
    return key in LOG_KEYS and bool(finite.min() > 0 and finite.max() > LOG_RATIO * finite.min())


def _panel(metrics: Metrics, key: str) -> str:
    import matplotlib as mpl

    values, finite = metrics.columns[key], metrics.finite(key)
    width, drawn = mean_width(metrics.num_rows), thin(values, MAX_POINTS)

    def draw(axes: Axes) -> None:
        axes.set_yscale("log" if _is_log(metrics, key) else "linear")
        dots = "." if finite.size == 1 else ""
        smooth = key != "lr" and width > 1
        axes.plot(metrics.steps[drawn], values[drawn], dots + "-", color=RAW if smooth else MEAN, linewidth=1.0)
        if smooth:
            axes.plot(metrics.steps, running_mean(values, width), color=MEAN, linewidth=1.8)
        if key == "data_wait":
            axes.set_ylim(0, max(1.0, float(finite.max())))
            axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        elif key not in LOG_KEYS:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")

    return themed_svg(draw, name=key, size=(9, 3.2) if key == "loss" else (4.4, 2.2))


def themed_svg(draw: Callable[[Axes], None], *, name: str, size: tuple[float, float]) -> str:
    """One plot as svg that takes colours and font from the page.

    Args:
        draw: fills the axes, with `INK`, `GRID`, `RAW`, `MEAN`, `SOFT` and `OTHER` for colours.
        name: of the plot on its page: ids differ between the plots of a page, and agree between two runs.
        size: inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # text stays text and takes the page's font
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": GRID,
        "grid.color": GRID,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue())


def _themed(svg: str) -> str:
    """Without the xml header and the fixed size, and with css variables for the stand-in colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    for stand_in, variable in _INKS.items():
        svg = svg.replace(stand_in, variable)
    return svg
