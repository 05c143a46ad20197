"""The report is one file that stands alone and shows what it was given, gaps and failures included."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from opensora_like.evaluation.curves import MAX_POINTS, read_metrics, running_mean, thin
from opensora_like.evaluation.report import (
    Clip,
    ContactSheet,
    Note,
    ScoreRow,
    ScoreTable,
    Table,
    write_report,
)

VOID = ("meta", "img", "br")


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_metrics(path: Path, num_rows: int) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {
            "step": step,
            "loss": 1 / step + 0.1 * rng.random(),
            "grad_norm": rng.random(),
            "lr": 1e-3,
            "samples_per_second": 50.0,
            "step_seconds": 0.25,
            "data_wait": 0.125,
            "epoch": 0,
        }
        for step in range(1, num_rows + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def clip(read: str, truth: str = "red", caption: str = "a red circle moving left") -> Clip:
    video = np.random.default_rng(0).uniform(-1, 1, (3, 5, 16, 16))
    return Clip(video, caption, {"colour": read, "shape": "circle"}, {"colour": truth, "shape": "circle"})


def test_the_page_stands_alone(tmp_path):
    """Well formed, no script, nothing fetched: every picture is inline and every svg is valid xml."""
    page = write_report(
        tmp_path / "deep/report.html",
        title="a <run> & more",
        summary={"steps": 60, "loss": 0.123456},
        metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", 60),
        sections=[
            ScoreTable("Scores", [ScoreRow("colour", 0.99, 100, 0.98)]),
            ContactSheet("Generated", [clip("red")]),
            Table("Machine", {"cores": 2}),
            Note("What", "text"),
        ],
        config="steps = 60 if 1 < 2 else 0",
    ).read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "<title>a &lt;run&gt; &amp; more</title>" in page and "1 &lt; 2" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "<script" not in page and "url(http" not in page and "@import" not in page
    graphs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(graphs) == 5
    for graph in graphs:
        ElementTree.fromstring(graph)
        assert "var(--" in graph and "#01020" not in graph
    assert "prefers-color-scheme: dark" in page
    for said in ("0.1235", "0.25", "12.5%", "50", "torch"):
        assert said in page


def test_scores_say_whether_the_target_was_reached():
    """At the target is reached, below is missed, unmeasured is neither, and no rounding turns a miss into a hit."""
    rows = [
        ScoreRow("at", 0.95, 20, 0.95),
        ScoreRow("below", 0.9799, 20, 0.98),
        ScoreRow("open", 0.5),
        ScoreRow("unknown", float("nan"), 0, 0.5),
    ]
    assert [row.is_reached for row in rows] == [True, False, None, False]
    html = ScoreTable("Scores", rows).html()
    verdicts = re.findall(r'<b class="(\w+)">([^<]*)</b>', html)
    assert verdicts == [("good", "reached"), ("bad", "missed"), ("bad", "not measured")]
    assert "97.9 %" in html and "98.0 %" in html and "not scored" in html


def test_a_contact_sheet_shows_the_first_clips_and_counts_all_that_are_wrong():
    """What is not drawn is counted; wrong ones are marked aspect by aspect."""
    clips = [clip("red"), clip("none"), clip("red"), clip("blue")]
    html = ContactSheet("Generated", clips, max_clips=2).html()
    assert "The first 2 of 4, in their order. Of 4 clips scored, 2 are wrong." in html
    assert html.count("<figure") == 2 and html.count('class="clip wrong"') == 1
    assert '<span class="bad">no colour &#10007;</span> <span class="good">circle</span>' in html
    assert "scored" not in ContactSheet("Real", [Clip(clips[0].video_CTHW, "caption")]).html()


def test_pictures_are_the_pixels_given(tmp_path):
    """Each frame is a png of its own size with the values of the clip; a long large clip is thinned."""
    import base64
    import io

    import torch
    from PIL import Image

    def pictures(video: object) -> list[np.ndarray]:
        html = ContactSheet("x", [Clip(video, "c")]).html()
        found = re.findall(r"base64,([^\"]*)", html)
        return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]

    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    video = torch.from_numpy(frames / 127.5 - 1).permute(3, 0, 1, 2)
    np.testing.assert_array_equal(np.stack(pictures(video)), frames)
    assert [p.shape for p in pictures(np.zeros((3, 81, 480, 832), np.float32))] == [(120, 208, 3)] * 8
    with pytest.raises(ValueError, match="cannot be shown"):
        pictures(frames)


def test_missing_metrics_leave_gaps_not_errors(tmp_path):
    """Rows without a key, "nan" as text, a repeated step and a last line cut by a kill are read for what they are."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": "nan"}\n{"step": 3, "note": "x"}\n'
        '{"step": 3, "loss": 0.5, "grad_norm": 2}\n{"step": 4, "lo'
    )
    metrics = read_metrics(path)
    assert metrics.is_cut and metrics.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(metrics.columns["loss"], [1.0, np.nan, 0.5])
    page = write_report(tmp_path / "r.html", title="t", summary={}, metrics_jsonl=path).read_text()
    assert page.count("<svg") == 2 and "cut off" in page and "<h2>Speed</h2>" not in page


def test_metrics_that_are_broken_in_the_middle_are_an_error(tmp_path):
    """Only the last line may be cut; a missing file is not an empty run."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="metrics"):
        write_report(tmp_path / "r.html", title="t", summary={}, metrics_jsonl=tmp_path / "none.jsonl")
    path.write_text("")
    assert "has no rows" in write_report(tmp_path / "r.html", title="t", summary={}, metrics_jsonl=path).read_text()


def test_thinning_keeps_spikes_and_ends():
    """Of a million points few are drawn, the least, the greatest, the first and the last among them."""
    values = np.random.default_rng(0).standard_normal(1_000_000)
    values[123_456], values[654_321] = 50, -50
    chosen = thin(values, MAX_POINTS)
    assert len(chosen) <= MAX_POINTS + 2 and {0, 123_456, 654_321, 999_999} <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all()


def test_the_running_mean_is_a_mean_of_what_is_known():
    """A constant with holes stays that constant; a wide hole stays a hole."""
    values = np.full(30, 2.0)
    values[[3, 4]] = np.nan
    np.testing.assert_allclose(running_mean(values, 5), 2.0)
    values[10:20] = np.inf
    assert np.isnan(running_mean(values, 5)[12:18]).all()
    np.testing.assert_allclose(running_mean(np.arange(9.0), 3)[1:-1], np.arange(1.0, 8.0))
