"""The sections of a run's report about validation: losses over time, noise levels, buckets, pairs, sample videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from opensora_like.evaluation.curves import GRID, MEAN, OTHER, SOFT, themed_svg
from opensora_like.evaluation.paired_loss import CONFIDENCE, Interval, LossSummary
from opensora_like.evaluation.report import _section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"base": SOFT, "raw": MEAN, "ema": OTHER}
NAMES = {"base": "the weights of the beginning", "raw": "weights", "ema": "EMA"}
WIDE, NARROW = (9, 3.2), (4.4, 2.6)  # inches
VERDICTS = {-1: '<b class="good">lower</b>', 0: "not decided", 1: '<b class="bad">higher</b>'}
LOG_RATIO = 3  # losses that span more than this are drawn on a logarithmic scale
MAX_STEPS = 5  # of which sample videos are shown: the first, the last, and some between


class Row(NamedTuple):
    """One measurement.

    Args:
        weights: "base", "raw" or "ema".
        difference: from the base; None of the base itself.
    """

    step: int
    weights: str
    loss: LossSummary
    difference: LossSummary | None


@dataclass(frozen=True)
class ValidationSection:
    """Held-out losses of a run, and how they differ from those of the beginning.

    Args:
        rows: at least one, steps rising.
        edges: of the noise levels.
    """

    rows: Sequence[Row]
    edges: Sequence[float]

    def html(self) -> str:
        newest = {row.weights: row for row in self.rows}  # the last of each kind
        loss = newest["base"].loss.overall
        note = (
            f"{loss.num} held-out clips, each at one t in {len(self.edges) - 1} equal parts of "
            f"[{self.edges[0]:g}, {self.edges[-1]:g}], with noise that never changes. Intervals cover the mean over "
            f"such clips with {CONFIDENCE:.0%}. A difference is that of the same clips, noise and t from the weights "
            "that training began with; below 0 is better. The loss is not weighted as in training."
        )
        plots = [
            self._over_steps("Loss of held-out clips", lambda row: row.loss.overall, kinds=("raw", "ema")),
            self._over_steps("Difference from the beginning", _difference, kinds=("raw", "ema"), zero=True),
            self._by_t("Loss by noise level", newest, lambda row: row.loss.by_t, kinds=("base", "raw", "ema")),
            self._by_t("Difference by noise level", newest, _difference_by_t, kinds=("raw", "ema")),
        ]
        curves = f'<div class="curves">{"".join(plots)}</div>'
        return _section("Validation", note, f"{_legend(newest)}{_overall(newest)}{curves}{_by_bucket(newest)}")

    def _over_steps(
        self, title: str, value: Callable[[Row], Interval | None], *, kinds: Sequence[str], zero: bool = False
    ) -> str:
        from matplotlib.ticker import MaxNLocator

        start = value(next(row for row in self.rows if row.weights == "base"))

        def draw(axes: Axes) -> None:
            if zero or start is not None:
                axes.axhline(0.0 if start is None else start.mean, color=SOFT, linewidth=1.0, linestyle="--")
            for kind in kinds:
                found = [(row.step, value(row)) for row in self.rows if row.weights == kind]
                if start is not None:
                    found = [(0, start), *found]
                elif found:
                    found = [(0, Interval(0.0, 0.0, 0.0, 0)), *found]
                if len(found) < 2:
                    continue
                steps = [step for step, _ in found]
                axes.plot(steps, [v.mean for _, v in found], ".-", color=COLOURS[kind], linewidth=1.6)
                low, high = [v.low for _, v in found], [v.high for _, v in found]
                axes.fill_between(steps, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)
            means = [v.mean for row in self.rows if (v := value(row)) is not None]
            if not zero and 0 < LOG_RATIO * min(means) < max(means):
                axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("step")

        return _figure(title, themed_svg(draw, name=title, size=NARROW))

    def _by_t(
        self,
        title: str,
        newest: Mapping[str, Row],
        values: Callable[[Row], Sequence[Interval]],
        *,
        kinds: Sequence[str],
    ) -> str:
        shown = [kind for kind in kinds if kind in newest]
        if not shown:
            return ""

        def draw(axes: Axes) -> None:
            places = np.arange(len(self.edges) - 1)
            width = 0.8 / len(shown)
            for number, kind in enumerate(shown):
                intervals = values(newest[kind])
                means = [v.mean for v in intervals]
                half = [v.high - v.mean if math.isfinite(v.high) else 0.0 for v in intervals]
                at = places + (number - (len(shown) - 1) / 2) * width
                axes.bar(at, means, width=0.9 * width, color=COLOURS[kind], zorder=2)
                axes.errorbar(at, means, yerr=half, fmt="none", ecolor="#010203", elinewidth=1.0, capsize=2.0, zorder=3)
            axes.axhline(0.0, color=GRID, linewidth=1.0)
            axes.set_xticks(np.arange(len(self.edges)) - 0.5, [f"{edge:.3g}" for edge in self.edges])
            axes.set_xlabel("t (1 is noise)")

        return _figure(title, themed_svg(draw, name=title, size=NARROW))


def _difference(row: Row) -> Interval | None:
    return row.difference.overall if row.difference is not None else None


def _difference_by_t(row: Row) -> Sequence[Interval]:
    assert row.difference is not None
    return row.difference.by_t


def _figure(title: str, svg: str) -> str:
    return f'<figure class="curve"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


def _legend(newest: Mapping[str, Row]) -> str:
    entries = "".join(
        f'<span class="key {kind}">{escape(NAMES[kind])}, step {newest[kind].step}</span>'
        for kind in COLOURS
        if kind in newest
    )
    return f'<p class="legend">{entries}</p>'


def plain_interval(interval: Interval, *, is_difference: bool = False) -> str:
    """A mean with its range: "0.5123 (0.49 to 0.53)"."""
    sign = "+" if is_difference else ""
    if not math.isfinite(interval.low):
        return f"{interval.mean:{sign}.4g}"
    return f"{interval.mean:{sign}.4g} ({interval.low:{sign}.3g} to {interval.high:{sign}.3g})"


def _cells(loss: Interval, difference: Interval | None) -> str:
    cells = f'<td class="number">{plain_interval(loss)}</td>'
    if difference is None:
        return f"{cells}<td></td><td></td>"
    verdict = VERDICTS[difference.sign] if math.isfinite(difference.low) else "1 clip only"
    return f'{cells}<td class="number">{plain_interval(difference, is_difference=True)}</td><td>{verdict}</td>'


def _overall(newest: Mapping[str, Row]) -> str:
    head = "<tr><th></th><th>clips</th><th>loss</th><th>difference from the beginning</th><th></th></tr>"
    rows = "".join(
        f"<tr><th>{escape(NAMES[kind])}, step {row.step}</th><td class='number'>{row.loss.overall.num}</td>"
        f"{_cells(row.loss.overall, _difference(row))}</tr>"
        for kind in COLOURS
        if (row := newest.get(kind)) is not None
    )
    return f'<table class="scores">{head}{rows}</table>'


def _by_bucket(newest: Mapping[str, Row]) -> str:
    head = "<tr><th>bucket</th><th>clips</th><th></th><th>loss</th><th>difference from the beginning</th><th></th></tr>"
    rows = ""
    for bucket, loss in newest["base"].loss.by_bucket.items():
        for kind in ("raw", "ema") if len(newest) > 1 else ("base",):
            row = newest.get(kind)
            if row is None:
                continue
            difference = row.difference.by_bucket[bucket] if row.difference is not None else None
            rows += (
                f"<tr><th>{escape(bucket)}</th><td class='number'>{loss.num}</td><td>{escape(NAMES[kind])}</td>"
                f"{_cells(row.loss.by_bucket[bucket], difference)}</tr>"
            )
    return f'<table class="scores">{head}{rows}</table>'


class SampleFile(NamedTuple):
    """One sampled file.

    Args:
        path: relative to the report.
        weights: "raw" or "ema".
    """

    step: int
    weights: str
    name: str
    caption: str
    path: str


@dataclass(frozen=True)
class VideoSheet:
    """Sampled videos, prompt by prompt, side by side over the steps.

    Args:
        files: in any order.
    """

    files: Sequence[SampleFile]

    def html(self) -> str:
        steps = sorted({file.step for file in self.files})
        places = np.linspace(0, len(steps) - 1, min(MAX_STEPS, len(steps))).round().astype(int)
        shown = [steps[place] for place in places]
        if len(steps) == 1:
            cells = "".join(_video(file, file.caption) for file in self.files)
            return _section("Samples", "", f'<div class="videos">{cells}</div>')
        note = "The same noise at every step."
        if len(shown) < len(steps):
            note += f" {len(shown)} of the {len(steps)} steps that were sampled; the others are in the folder samples."
        body = "".join(self._prompt(name, shown) for name in dict.fromkeys(file.name for file in self.files))
        return _section("Samples", note, body)

    def _prompt(self, name: str, steps: Sequence[int]) -> str:
        files = {file.step: file for file in self.files if file.name == name}
        caption = next(iter(files.values())).caption
        cells = "".join(
            _video(files[step], f"step {step}, {NAMES[files[step].weights]}") for step in steps if step in files
        )
        return f'<h3>{escape(caption)}</h3><div class="videos">{cells}</div>'


def _video(file: SampleFile, label: str) -> str:
    source = escape(file.path, quote=True)
    if file.path.endswith(".png"):
        picture = f'<img src="{source}" alt="{escape(file.caption, quote=True)}">'
    else:
        picture = f'<video src="{source}" controls loop muted playsinline preload="auto"></video>'
    return f"<figure>{picture}<figcaption>{escape(label)}</figcaption></figure>"


def row_of(values: Mapping[str, Any]) -> Row:
    """A line of validation.jsonl."""
    difference = values["difference"]
    return Row(
        step=int(values["step"]),
        weights=values["weights"],
        loss=LossSummary.from_json(values["loss"]),
        difference=None if difference is None else LossSummary.from_json(difference),
    )
