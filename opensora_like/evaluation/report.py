"""One static html file about a run: scores against targets, clips, training curves, speed, config and versions.

It needs no network, and no other file but the sample videos of a run, which it links. What it shows is what it was
given: nothing is chosen, and what was left out, averaged or missing is said where it is shown.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opensora_like.datasets.resize import to_frames
from opensora_like.evaluation.curves import Metrics, curves_svg, mean_width, read_metrics, speed_rows

PACKAGES = ("torch", "numpy", "av", "mmengine-lite", "colossalai", "diffusers", "transformers")


class Section(Protocol):
    """A part of the report."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class ScoreRow:
    """One number with its target. Higher is better.

    Args:
        value: 0 to 1, shown in percent.
        num: how many clips it is the mean of.
        target: least value that counts as reached; None if there is none.
    """

    name: str
    value: float
    num: int | None = None
    target: float | None = None

    @property
    def is_reached(self) -> bool | None:
        """None without a target; a value that is not a number reaches nothing."""
        return None if self.target is None else bool(self.value >= self.target)


@dataclass(frozen=True)
class ScoreTable:
    """Scores, their targets and whether they were reached."""

    title: str
    rows: Sequence[ScoreRow]
    note: str = ""

    def html(self) -> str:
        body = "".join(_score_html(row) for row in self.rows)
        head = "<tr><th>score</th><th>measured</th><th></th><th>clips</th><th>target</th><th></th></tr>"
        return _section(self.title, self.note, f'<table class="scores">{head}{body}</table>')


@dataclass(frozen=True)
class Clip:
    """One clip of a contact sheet.

    Args:
        video_CTHW: array or tensor [3, T, H, W] in [-1, 1].
        read, truth: aspect -> name, what the scorer read and what was asked for; compared where both are given.
    """

    video_CTHW: Any
    caption: str
    read: Mapping[str, str] | None = None
    truth: Mapping[str, str] | None = None
    label: str = ""

    @property
    def wrong(self) -> list[str]:
        """Aspects that were read otherwise than asked for."""
        read, truth = self.read or {}, self.truth or {}
        return [aspect for aspect in read if truth.get(aspect) and read[aspect] != truth[aspect]]


@dataclass(frozen=True)
class ContactSheet:
    """Clips as strips of frames, the first ones in the order given.

    Args:
        max_clips: how many are drawn. The heading says how many of how many, and how many of all are wrong.
    """

    title: str
    clips: Sequence[Clip]
    note: str = ""
    max_clips: int = 24

    def html(self) -> str:
        shown = self.clips[: self.max_clips]
        which = f"All {len(shown)}" if len(shown) == len(self.clips) else f"The first {len(shown)} of {len(self.clips)}"
        judged = [clip for clip in self.clips if clip.read is not None and clip.truth is not None]
        wrong = sum(bool(clip.wrong) for clip in judged)
        verdict = f" Of {len(judged)} clips scored, {wrong} {'is' if wrong == 1 else 'are'} wrong." if judged else ""
        note = f"{self.note} {which}, in their order.{verdict}".strip()
        return _section(self.title, note, f'<div class="sheet">{"".join(map(_clip_html, shown))}</div>')


@dataclass(frozen=True)
class Table:
    """Names and values."""

    title: str
    values: Mapping[str, Any]
    note: str = ""

    def html(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in self.values.items()
        )
        return _section(self.title, self.note, f'<table class="facts">{rows}</table>')


@dataclass(frozen=True)
class Note:
    """A paragraph, or text kept as it is (a log, a config) behind a line to unfold."""

    title: str
    text: str
    is_code: bool = False

    def html(self) -> str:
        if not self.is_code:
            return _section(self.title, self.text, "")
        return (
            f"<section><details><summary><h2>{escape(self.title)}</h2></summary>"
            f"<pre>{escape(self.text)}</pre></details></section>"
        )


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    metrics_jsonl: str | Path | None = None,
    sections: Sequence[Section] = (),
    config: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report.

    Args:
        summary: the few facts at the top, name -> value, in the order shown.
        metrics_jsonl: one json object per line with `step` and any of loss, grad_norm, lr, samples_per_second,
            step_seconds, data_wait (share of the time), peak_gib; other numbers are left alone.
        sections: what comes between the summary and the curves.
        config: the resolved config as text.
        versions: name -> version; those of this process if not given.

    Returns: `path`.

    Raises:
        FileNotFoundError: `metrics_jsonl` is given and not there.
        ValueError: a line of it, other than a last one that was cut off, is not a json object with a `step`.
    """
    parts = [_summary_html(summary), *(section.html() for section in sections)]
    if metrics_jsonl is not None:
        parts.append(_training_html(read_metrics(metrics_jsonl)))
    if config is not None:
        parts.append(Note("Config", config, is_code=True).html())
    parts.append(Table("Versions", installed_versions() if versions is None else versions).html())
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page = _PAGE.format(
        title=escape(title), style=_STYLE, body="\n".join(parts), foot=f"Written {written} by opensora_like."
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def installed_versions() -> dict[str, str]:
    """Versions of what decides numbers and speed, and the machine; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _training_html(metrics: Metrics) -> str:
    if not metrics.num_rows:
        return _section("Training", f"{metrics.name} has no rows.", "")
    svg = curves_svg(metrics)
    cut = " Its last line was cut off and is left out." if metrics.is_cut else ""
    note = f"{metrics.num_rows} rows of {metrics.name}, steps {metrics.steps[0]:.0f} to {metrics.steps[-1]:.0f}.{cut}"
    if svg:
        width = mean_width(metrics.num_rows)
        thick = f" Thin: as logged. Thick: mean of the {width} rows around." if width > 1 else ""
        note += thick + " Gaps are values that were not logged or not finite."
    curves = _section("Training", note, f'<div class="curves">{svg}</div>' if svg else "")
    speed = speed_rows(metrics)
    return curves + (Table("Speed", speed, "Of the training loop, over the rows above.").html() if speed else "")


def _section(title: str, note: str, content: str) -> str:
    paragraph = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def _summary_html(summary: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile"><span>{escape(str(k))}</span><strong>{escape(_plain(v))}</strong></div>'
        for k, v in summary.items()
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _plain(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float) -> str:
    """In percent, cut and not rounded, so that 99.96 % does not read 100 %, nor a miss like its target."""
    return f"{math.floor(value * 1000 + 1e-9) / 10:.1f} %" if math.isfinite(value) else "not scored"


def _score_html(row: ScoreRow) -> str:
    width = 100 * min(max(row.value, 0.0), 1.0) if math.isfinite(row.value) else 0.0
    target = "" if row.target is None else f'<i style="left:{100 * row.target:.1f}%"></i>'
    missed = "missed" if math.isfinite(row.value) else "not measured"
    verdict = {None: "", True: '<b class="good">reached</b>', False: f'<b class="bad">{missed}</b>'}[row.is_reached]
    return (
        f'<tr><th>{escape(row.name)}</th><td class="number">{_percent(row.value)}</td>'
        f'<td><div class="bar"><div style="width:{width:.1f}%"></div>{target}</div></td>'
        f'<td class="number">{"" if row.num is None else row.num}</td>'
        f'<td class="number">{"" if row.target is None else "&ge; " + _percent(row.target)}</td><td>{verdict}</td></tr>'
    )


def _clip_html(clip: Clip) -> str:
    frames = _frames(clip.video_CTHW)
    num_frames, height, width = frames.shape[:3]
    label = f'<span class="label">{escape(clip.label)}</span>' if clip.label else ""
    words = []
    for aspect, name in (clip.read or {}).items():
        wanted = (clip.truth or {}).get(aspect)
        kind = "" if not wanted else "bad" if aspect in clip.wrong else "good"
        said = f"no {aspect}" if name == "none" else name
        words.append(f'<span class="{kind}">{escape(said)}{" &#10007;" if kind == "bad" else ""}</span>')
    read = f'<div class="read">read: {" ".join(words)}</div>' if words else ""
    pictures = "".join(
        f'<img src="{_png(frame)}" width="{width}" height="{height}" alt="frame {i + 1} of {num_frames}">'
        for i, frame in enumerate(frames)
    )
    return (
        f'<figure class="clip{" wrong" if clip.wrong else ""}"><figcaption>{escape(clip.caption)}{label}</figcaption>'
        f'<div class="strip" style="grid-template-columns:repeat({num_frames},1fr)">{pictures}</div>{read}</figure>'
    )


MAX_FRAMES = 8  # of a long clip, evenly spread
MAX_HEIGHT = 128  # pixels; larger frames are reduced by a whole factor


def _frames(video_CTHW: Any) -> np.ndarray:
    """uint8 [T, H, W, C] of at most `MAX_FRAMES` frames, reduced where they are large."""
    if hasattr(video_CTHW, "detach"):  # a tensor; torch itself is not needed
        video_CTHW = video_CTHW.detach().float().cpu().numpy()
    video = np.asarray(video_CTHW, dtype=np.float32)
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a clip of shape {video.shape} cannot be shown; give [3, T, H, W]")
    chosen = np.linspace(0, video.shape[1] - 1, min(video.shape[1], MAX_FRAMES)).round().astype(int)
    factor = math.ceil(video.shape[2] / MAX_HEIGHT)
    video = np.nan_to_num(video[:, chosen, ::factor, ::factor], nan=-1.0)
    return to_frames(video)


def _png(frame_HWC: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
<footer>{foot}</footer>
</main>
</body>
</html>
"""

_STYLE = """
:root { --page: #f7f7f5; --card: #ffffff; --ink: #1d2228; --soft: #5b6570; --grid: #d9dde1; --raw: #a9c3e8;
  --mean: #1f5fb4; --other: #b4601f; --good: #1a7f4b; --bad: #b3261e; --line: #e2e4e7; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #a0a8b0;
  --grid: #363c42; --raw: #3f5f8c; --mean: #8ab6f5; --other: #f0a868; --good: #63c995; --bad: #ff8a80;
  --line: #2d3338; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 20px; }
h2 { font-size: 1.1rem; margin: 0 0 4px; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 18px 20px; margin-top: 16px; overflow-x: auto; }
.note { color: var(--soft); margin: 0 0 12px; max-width: 80ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { padding: 12px 16px; }
.tile span { display: block; color: var(--soft); font-size: .82rem; }
.tile strong { font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
.scores { width: 100%; margin-bottom: 14px; }
.scores tr:first-child th, .facts th { color: var(--soft); font-size: .88rem; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { position: relative; height: 10px; min-width: 140px; border-radius: 5px; background: var(--line); }
.bar div { height: 100%; border-radius: 5px; background: var(--mean); }
.bar i { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--ink); }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
figure { margin: 0; }
.clip { padding: 10px 12px; border: 1px solid var(--line); border-radius: 6px; }
.clip.wrong { border-color: var(--bad); }
.clip figcaption { font-size: .9rem; margin-bottom: 6px; display: flex; justify-content: space-between; gap: 8px; }
.label { color: var(--soft); white-space: nowrap; }
.strip { display: grid; gap: 3px; }
.strip img { display: block; width: 100%; height: auto; image-rendering: pixelated; outline: 1px solid var(--grid); }
.read { font-size: .82rem; color: var(--soft); margin-top: 6px; }
.read span { margin-right: 6px; white-space: nowrap; }
h3 { font-size: .95rem; font-weight: 500; margin: 14px 0 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; font-size: .88rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.key.base::before { background: var(--soft); }
.key.raw::before { background: var(--mean); }
.key.ema::before { background: var(--other); }
.videos { display: grid; grid-template-columns: repeat(5, 1fr); gap: 10px; }
.videos video, .videos img { display: block; width: 100%; outline: 1px solid var(--grid); }
.videos figcaption { font-size: .82rem; color: var(--soft); }
.curves { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.curve.loss { grid-column: 1 / -1; }
.curve figcaption { font-size: .88rem; color: var(--soft); }
.curve svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; }
summary h2 { display: inline; }
pre { overflow-x: auto; font-size: .82rem; margin: 12px 0 0; }
footer { color: var(--soft); font-size: .82rem; margin-top: 24px; }
@media (max-width: 700px) { .curves { grid-template-columns: 1fr; } .bar { display: none; }
  th, td { padding-right: 10px; } }
"""
