"""The page of a run that trains: it shows what was measured and sampled, is kept up, and survives a resume."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.held_out import MeasuredLosses
from opensora_like.datasets.video_io import probe
from opensora_like.evaluation.observe import RunObserver, read_sampling
from opensora_like.evaluation.paired_loss import summarize, summarize_pairs
from opensora_like.evaluation.validation_report import MAX_STEPS, Row, SampleFile, ValidationSection, VideoSheet
from opensora_like.preparation.table import cache_table
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train
from tests.evaluation.test_report import Balance
from tests.training.cached_clips import config_of, from_cache, from_videos, patch, write_table
from tests.training.harness import CONFIG, Killed, assert_same, metrics_of, train_toy

WATCHED = [
    "--validation", "{'every': 2, 'dataset': {'num_clips': 20}, 'num_clips': 6, 'num_bins': 2}", "--sample-every", "3",
    "--sampling", "{'prompts': ['a <b>', 'a <b>'], 'height': 16, 'width': 16, 'num_frames': 5, 'num_steps': 2}",
    "--ckpt-every", "3",
]  # fmt: skip


def watch(outputs: Path, *arguments: str, observe: type[RunObserver] = RunObserver) -> Run:
    config = read_config(CONFIG, ["--outputs", str(outputs), *WATCHED, *arguments]).config
    run = build_run(config, rt.start(), config_name=str(CONFIG), observe=observe)
    train(run)
    return run


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    outputs = tmp_path_factory.mktemp("watched")
    return watch(outputs, "--steps", "7"), outputs / "toy"


def test_the_run_is_the_one_without(watched: tuple[Run, Path], tmp_path: Path) -> None:
    """Real sampling and the report, which imports matplotlib, leave losses and weights as they are, bit for bit."""
    run, folder = watched
    plain = train_toy(tmp_path, "--steps", "7", "--ckpt-every", "3")
    assert_same(run, plain)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows if "loss" in r] == metrics_of(tmp_path / "toy", "step", "loss")


def test_the_page_shows_what_was_seen(watched: tuple[Run, Path]) -> None:
    """Well formed, no script, nothing fetched; every linked video exists; the newest numbers are on it."""
    _, folder = watched
    page = (folder / "report.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    videos = re.findall(r'<video src="([^"]*)"', page)
    assert len(videos) == 8 and all((folder / video).is_file() for video in videos)
    assert probe(str(folder / videos[0])).num_frames == 5
    assert "<script" not in page and "http" not in re.sub(r'"http://www.w3.org/[^"]*"', "", page)
    for graph in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(graph)
        assert "#01020" not in graph
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["weights"]) for row in rows] == [(0, "base")] + [
        (step, weights) for step in (2, 4, 6, 7) for weights in ("raw", "ema")
    ]
    last = rows[-1]["difference"]["overall"]
    assert f"{last['mean']:+.4g} ({last['low']:+.3g} to {last['high']:+.3g})" in page
    assert "a &lt;b&gt;" in page and "step 7, EMA" in page and "7 of 7" in page
    for title in ("Loss of held-out clips", "Difference by noise level", "8px_ar1:1/9 8x8", "<h2>Training</h2>"):
        assert title in page


def test_rows_are_the_statistics_of_the_tables(watched: tuple[Run, Path]) -> None:
    """What is shown is computed from the tables that are kept beside it."""
    _, folder = watched
    row = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    losses, base = (np.load(folder / "validation" / name) for name in ("step00000007-ema.npy", "base.npy"))
    names = list(row["loss"]["by_bucket"])
    assert row["loss"]["overall"]["mean"] == pytest.approx(losses.mean())
    assert row["difference"]["overall"]["mean"] == pytest.approx((losses - base).mean())
    assert sum(row["loss"]["by_bucket"][name]["num"] for name in names) == len(losses) == 6


def test_equal_prompts_have_noise_of_their_own(watched: tuple[Run, Path]) -> None:
    """And each has the same at every step, so what changes is the weights' doing."""
    _, folder = watched
    first = [(folder / f"samples/step00000000/prompt_{n:04d}.mp4").read_bytes() for n in (0, 1)]
    assert first[0] != first[1]
    steps = [json.loads(f.read_text()) for f in sorted(folder.glob("samples/step*/samples.json"))]
    assert [(rows[0]["step"], rows[0]["weights"]) for rows in steps] == [(0, "raw"), (3, "ema"), (6, "ema"), (7, "ema")]


def test_a_resume_goes_on_with_page_and_rows(watched: tuple[Run, Path], tmp_path: Path) -> None:
    """Rows of updates that are made again are measured again, once, with the same numbers."""
    watch(tmp_path, "--steps", "5")
    (tmp_path / "toy/epoch0-global_step5").rename(tmp_path / "gone")  # back to step 3
    watch(tmp_path, "--steps", "7", "--load", "latest")
    mine, whole = ((f / "validation.jsonl").read_text() for f in (tmp_path / "toy", watched[1]))
    assert mine == whole
    page = (tmp_path / "toy/report.html").read_text()
    assert "step 7, EMA" in page and "step 5" not in page


class Dying(RunObserver):
    """Killed between two rows of one step, after its checkpoint."""

    def measured(self, seen: MeasuredLosses) -> dict[str, float]:
        if (seen.step, seen.weights) == (6, "ema"):
            raise Killed
        return super().measured(seen)


def test_a_kill_between_two_rows_leaves_each_once(watched: tuple[Run, Path], tmp_path: Path) -> None:
    """What the resumed run has to measure again of that step replaces what was written of it."""
    with pytest.raises(Killed):
        watch(tmp_path, "--steps", "7", observe=Dying)
    assert '"weights": "raw"' in (tmp_path / "toy/validation.jsonl").read_text().splitlines()[-1]
    watch(tmp_path, "--steps", "7", "--load", "latest")
    mine, whole = ((folder / "validation.jsonl").read_text() for folder in (tmp_path / "toy", watched[1]))
    assert mine == whole


def test_validation_may_be_turned_on_later(tmp_path: Path) -> None:
    """The weights of the beginning are then those that the config builds; the page begins with them."""
    train_toy(tmp_path, "--steps", "3")
    watch(tmp_path, "--steps", "4", "--load", "latest")
    rows = [json.loads(line) for line in (tmp_path / "toy/validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["weights"]) for row in rows] == [(0, "base"), (4, "raw"), (4, "ema")]
    watch(tmp_path / "whole", "--steps", "4")
    base = [np.load(tmp_path / run / "validation/base.npy") for run in ("toy", "whole/toy")]
    assert np.array_equal(*base)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("{}", "sampling.prompts is missing"),
        ("{'prompts': ['a'], 'heigth': 16}", "sampling.heigth.*height"),
        ("{'prompts': ['a'], 'model': {}}", "sampling.model is decided by the run"),
        ("{'prompts': ['a'], 'end_index': 1}", "sampling.end_index is not read with a list"),
        ("{'prompts': ['a'], 'height': 15, 'width': 16}", "height=15 must be a multiple"),
        ("{'prompts': 'gone.csv', 'height': 16, 'width': 16}", "gone.csv"),
    ],
)
def test_sampling_is_checked_before_training(tmp_path: Path, sampling: str, message: str) -> None:
    """With the section's own names."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        watch(tmp_path, "--sampling", sampling)


def test_prompts_of_a_csv(tmp_path: Path) -> None:
    """Texts, names and negatives as for inference."""
    (tmp_path / "p.csv").write_text("text,name,neg\na cat,cat,dogs\n")
    config = read_config(CONFIG, ["--sampling", f"{{'prompts': '{tmp_path}/p.csv', 'guidance': 3}}"]).config
    sampling, (prompt,) = read_sampling(config)
    assert (prompt.text, prompt.name, prompt.negative, sampling.guidance) == ("a cat", "cat", "dogs", 3.0)
    assert sampling.model == config.model and sampling.dtype == config.dtype


def test_a_reference_is_of_all_texts_of_a_list() -> None:
    """As the negative prompt is."""
    section = "{'prompts': ['a cat', 'a dog'], 'ref': 'a.png; b.png', 'negative_prompt': 'dull'}"
    _, prompts = read_sampling(read_config(CONFIG, ["--sampling", section]).config)
    assert [(p.refs, p.negative) for p in prompts] == 2 * [(("a.png", "b.png"), "dull")]


def test_few_steps_of_many_are_shown_and_said() -> None:
    """The first, the last and some between; one clip has a mean and no interval."""
    files = [SampleFile(step, "raw", "p", "a cat", f"samples/{step}.png") for step in range(0, 100, 10)]
    html = VideoSheet(files).html()
    assert html.count("<img") == MAX_STEPS and "step 0," in html and "step 90," in html
    assert f"{MAX_STEPS} of the 10 steps" in html
    base, better = np.array([[1.0, 2.0]]), np.array([[0.5, 1.0]])
    rows = [
        Row(0, "base", summarize(base, ["b"]), None),
        Row(5, "raw", summarize(better, ["b"]), summarize_pairs(better, base, ["b"])),
    ]
    html = ValidationSection(rows, [0.0, 0.5, 1.0]).html()
    assert "1 clip only" in html and "nan" not in html


def test_a_run_on_cached_latents_is_looked_at_like_one_on_videos(tmp_path: Path) -> None:
    """A held-out share of the table: the same samples and training, and losses of the same clips, of which the store
    has frames that another seed drew. The autoencoder is built for sampling; prompts are encoded before training."""
    table = write_table(tmp_path)
    looking = [
        *patch(), "--validation", "{'every': 2, 'share': 0.4, 'num_clips': 4, 'num_bins': 2}", "--sample-every", "2",
        "--sampling", "{'prompts': ['clip 1'], 'height': 16, 'width': 16, 'num_frames': 5, 'num_steps': 2}",
        "--steps", "3",
    ]  # fmt: skip
    cache_table(config_of(*patch(), *from_videos(table)), tmp_path / "store", epochs=3)
    runs = {}
    for name, dataset in (("videos", from_videos(table)), ("cached", from_cache(tmp_path / "store", table))):
        config = read_config(CONFIG, ["--outputs", str(tmp_path / name), *looking, *dataset]).config
        runs[name] = build_run(config, rt.start(), config_name=str(CONFIG), observe=RunObserver)
        train(runs[name])
    assert_same(runs["cached"], runs["videos"])
    videos, cached = (tmp_path / name / "toy" for name in ("videos", "cached"))
    for file in ("samples/step00000000/prompt_0000.mp4", "samples/step00000003/prompt_0000.mp4"):
        assert (cached / file).read_bytes() == (videos / file).read_bytes()
    facts = [json.loads((folder / "validation/clips.json").read_text()) for folder in (videos, cached)]
    assert facts[0]["rows"] == facts[1]["rows"] and facts[0]["table"] == facts[1]["table"]
    losses = [np.load(folder / "validation/step00000003-ema.npy") for folder in (videos, cached)]
    np.testing.assert_allclose(*losses, rtol=0.05)
