"""tools/doctor.py tells of a table with every kind of defect exactly what training then meets."""

import csv
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.video_text import VideoText
from opensora_like.training.build import build_run
from opensora_like.training.trainer import train
from tests.make_clips import numbered_frames, write_clip
from tools import doctor

ROOT = Path(__file__).parents[2]
BUCKETS = {"_delete_": True, "32px": {17: (0.0, 2), 5: (1.0, 2)}}
SOUND = 7  # clips that nothing is wrong with; odd, so that one is left over
# file, text, frames, height, width, fps of every other row -> its outcome, its defects
ODD = {
    "short": ((None, "s", 3, 64, 96, 24), "too_few_frames", ()),
    "fast": ((None, "f", 12, 64, 96, 120), "too_few_frames", ()),
    "small": ((None, "m", 12, 16, 24, 24), "too_small", ("absurd_size",)),
    "photo": (("photo.png", "p", 1, 64, 96, ""), "no_image_bucket", ()),
    "broken": ((None, "b", 12, 0, 96, 24), "invalid_numbers", ("absurd_size",)),
    "long": ((None, "l", 24, 64, 96, 24), "lost_draw", ()),
    "gone": (("gone.mp4", "g", 12, 64, 96, 24), "kept", ("missing_file",)),
    "text": (("text.mp4", "t", 12, 64, 96, 24), "kept", ("undecodable",)),
    "shorter": ((None, "h", 16, 64, 96, 0.5), "kept", ("undecodable", "absurd_fps")),
    "mute": ((None, " ", 12, 64, 96, 24), "kept", ("empty_caption",)),
    "twice": ((None, "clip 0", 12, 64, 96, 24), "kept", ("duplicate_caption",)),
    "timeless": ((None, "e", 12, 64, 96, ""), "kept", ("unknown_fps",)),
    "strip": (("strip.mp4", "o", 12, 32, 320, 24), "kept", ("absurd_size",)),
}
HARMFUL = {"small", "broken", "gone", "text", "shorter", "mute", "strip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files, clips.csv and config.py."""
    folder = tmp_path_factory.mktemp("doctor")
    write_clip(folder / "a.mp4", numbered_frames(12, 64, 96))
    write_clip(folder / "strip.mp4", numbered_frames(12, 32, 320))
    write_clip(folder / "shorter.mp4", numbered_frames(4, 64, 96))
    (folder / "text.mp4").write_text("no video" * 99)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(folder / "photo.png")
    rows = [("a.mp4", f"clip {i}", 12, 64, 96, 24) for i in range(SOUND)]
    rows += [
        ((path or ("shorter.mp4" if n == "shorter" else "a.mp4")), *rest) for n, ((path, *rest), _, _) in ODD.items()
    ]
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "num_frames", "height", "width", "fps"), *rows])
    (folder / "config.py").write_text(
        f'_base_ = ["{ROOT}/configs/diffusion/train/tiny.py"]\nbucket_config = {BUCKETS!r}\n'
        "model = dict(hidden_size=64, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6))\n"
        'booster = dict(_delete_=True, type="ddp")\nnum_workers = 0\ntensorboard = False\nlog_every = 1\n'
        f'outputs = "{folder}"\nexp_name = "run"\nmax_bad_fraction = 0.0\nema_decay = None\n'
    )
    return folder


@pytest.fixture
def examine(folder, tmp_path, capsys):
    """Runs the tool in this process. Returns: exit code, output, errors, folder of the results."""

    def run(*arguments, table="clips.csv"):
        given = [folder / table, "--config", folder / "config.py", "--output", tmp_path / "out", *arguments]
        code = doctor.main([str(argument) for argument in given])
        return code, *capsys.readouterr(), tmp_path / "out"

    return run


def _number(out, name):
    """The first number of a line of a terminal table."""
    return int(re.search(rf"│ {name} +│ +([\d,]+)", out)[1].replace(",", ""))


def test_every_kind_of_defect_is_counted(examine, folder):
    """Outcomes and defects have the numbers of rows that were made for them, and each odd row is listed by name."""
    code, out, errors, output = examine("--decode", 1000)
    assert code == 0, errors
    plan = VideoText(str(folder / "clips.csv"), bucket_config={"32px": BUCKETS["32px"]}, multiple=16, seed=42).plan(0)
    kept = {int(row) for i in range(len(plan)) for row in plan[i].rows}
    outcomes = Counter(outcome for _, outcome, _ in ODD.values())
    for name in ("too_few_frames", "too_small", "no_image_bucket", "invalid_numbers", "lost_draw"):
        assert _number(out, name) == outcomes[name], name
    assert _number(out, "kept") == len(kept)
    assert _number(out, "batch_remainder") == SOUND + outcomes["kept"] - len(kept)
    defects = Counter(defect for _, _, found in ODD.values() for defect in found)
    for name, number in defects.items():
        assert _number(out, name) == number, name
    assert "raise fps_max to 60" in re.sub(r"[\s│]+", " ", out)  # 12 frames at 120 fps have 6 at 60

    with (output / "offenders.csv").open() as file:
        listed = list(csv.DictReader(file))
    names = [None] * SOUND + list(ODD)
    expected = {(SOUND + i, d) for i, (_, _, found) in enumerate(ODD.values()) for d in found}
    ordinary = ("kept", "lost_draw")
    expected |= {(SOUND + i, o) for i, (_, o, _) in enumerate(ODD.values()) if o not in ordinary}
    assert {(int(line["row"]), line["reason"]) for line in listed} == expected
    details = {names[int(line["row"])]: line["detail"] for line in listed if line["detail"]}
    assert "does not exist" in details["gone"] and "not a video" in details["text"] and "4 frames" in details["shorter"]
    with (output / "quarantine.csv").open() as file:
        assert {names[int(line["row"])] for line in csv.DictReader(file)} == HARMFUL


def test_steps_are_those_of_training(examine):
    """Whole steps for every number of processes asked for, and what would not divide is said."""
    code, out, _, _ = examine("--world-size", 1, 2, 3, "--accumulation-steps", 2, "--decode", 0, "--files", 0)
    micro = sum(int(n) for n in re.findall(r"│ 32px/5 +│ +\d+ │ +\d+ │ +(\d+)", out))
    for world in (1, 2, 3):
        steps, unused = re.search(rf"│ {world} +│ +{world} │ +2 │ +(\d+) │ +(\d+)", out).groups()
        assert (int(steps), int(unused)) == divmod(micro, 2 * world)
    assert code == 0 and "missing_file" not in out and "undecodable" not in out


def test_batch_sizes_asked_for_are_those_of_training(examine):
    """local_batch_size replaces that of the buckets; global_batch_size gives every world its steps, or says why."""
    sizes = ("--local-batch-size", 3, "--global-batch-size", 12, "--world-size", 1, 2, 8)
    _, out, _, _ = examine(*sizes, "--decode", 0, "--files", 0)
    micro = int(re.search(r"│ 32px/5 +│ +14 │ +3 │ +(\d+)", out)[1])
    for world, accumulation in ((1, 4), (2, 2)):
        steps = re.search(rf"│ {world} +│ +{world} │ +{accumulation} │ +(\d+)", out)[1]
        assert int(steps) == micro // 4
    assert "cannot be made of batches of 3 on 8" in " ".join(re.sub(r"[│\s]+", " ", out).split())


def test_the_page_stands_alone(examine):
    """Well formed, nothing fetched, plots inline, paths escaped; every outcome and defect is in it."""
    _, _, _, output = examine("--decode", 100, "--workers", 2)
    page = (output / "report.html").read_text()

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012 (of one page)

        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & {
                name for name, value in attrs if value and not value.startswith(("#", "data:"))
            }
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    Balance().feed(page)
    assert not Balance.open and "<script" not in page and page.count("<svg") == 3
    for name in (
        "too_few_frames",
        "lost_draw",
        "missing_file",
        "undecodable",
        "duplicate_caption",
        "gone.mp4",
        "32px/5",
    ):
        assert name in page, name


def _train(folder, *arguments):
    """A run of this table. Returns: the run, and the rows that it read."""
    table = ["--dataset.data-path", str(folder / "clips.csv"), "--steps", "12"]
    config = read_config(folder / "config.py", [*table, *map(str, arguments)]).config
    run = build_run(config, rt.start(), config_name="config.py")
    seen, inner = set(), run.on_batch

    def on_batch(batch):
        seen.update(batch.rows)
        inner(batch)

    run.on_batch = on_batch
    train(run)
    return run, seen


def test_training_honours_the_quarantine(examine, folder, tmp_path):
    """Without the list a run meets a bad file and stops; with it, it trains on the rest; a changed list is named."""
    _, _, _, output = examine("--decode", 1000)
    listed = output / "quarantine.csv"
    with pytest.raises(ValueError, match=r"samples cannot be read, max_bad_fraction=0\.0"):
        _train(folder, "--exp-name", "without", "--steps", 60)
    run, seen = _train(folder, "--dataset.quarantine", listed)
    names = [None] * SOUND + list(ODD)
    assert not {names[row] for row in seen} & HARMFUL and len(seen) == SOUND + 2
    assert run.state.step == 12 and not (folder / "run/bad_samples.jsonl").exists()

    shorter = tmp_path / "shorter.csv"
    shorter.write_text("".join(listed.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"dataset.quarantine: 7 rows \(.+\) -> 6 rows"):
        _train(folder, "--dataset.quarantine", shorter, "--load", "latest", "--steps", 13)
    run, seen = _train(folder, "--dataset.quarantine", listed, "--load", "latest", "--steps", 14)
    assert run.state.step == 14 and seen

    code, out, _, again = examine("--dataset.quarantine", listed, "--decode", 100)
    assert code == 0 and _number(out, "quarantined") == len(HARMFUL)
    rows = {line.split(",")[0] for line in listed.read_text().splitlines()}
    assert {line.split(",")[0] for line in (again / "quarantine.csv").read_text().splitlines()} == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bucket_config.32px.5", "(1.0, 90)"), "bucket 32px/5 has 13 clips of ratio 16:9 but its batch size is 90"),
        (
            ("--bucket_config", "{'32px': {51: (1.0, 1)}}"),
            "none has the 51 that bucket 32px/51 needs at fps_max=24.0, the longest has 24: use a bucket of 24 "
            "frames or fewer",
        ),
        (("--accumulation-steps", 50), "no step: "),
        (("--autoencoder.temporal_stride", 4, "--bucket_config.32px.6", "(1.0, 1)"), "bucket_config.32px.6"),
    ],
)
def test_a_run_that_would_see_nothing_is_1_and_training_says_the_same(examine, folder, arguments, message):
    """Exit code 1 and the number to change; training refuses to start with the same words, before any step."""
    code, out, _, output = examine(*arguments, "--decode", 0)
    plain = " ".join(out.split("training would not run")[1].split())
    assert code == 1 and message in plain
    assert "Training would not run" in (output / "report.html").read_text()
    said = "one step takes 50" if "no step" in message else re.escape(message)
    for steps in (12, None):  # without a number of steps, an epoch of none would be over at once
        with pytest.raises(ValueError, match=said):
            _train(folder, "--exp-name", "nothing", "--steps", steps, *arguments)
    assert not (folder / "nothing/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset.fps_mx", 8), "fps_max"),
        (("--quarantine", "emty_caption"), "empty_caption"),
        (("--dataset.data-path", "b.csv"), "given twice"),
        (("--decode", -1), "must be 0 or more"),
        (("--world-size", 2, 0), "--world-size 0 must be 1 or more"),
        (("--dataset.quarantine", "none.csv"), "does not exist"),
    ],
)
def test_a_slip_of_the_pen_is_2(examine, arguments, message):
    """One line with the nearest name, no traceback."""
    code, _, errors, _ = examine(*arguments)
    assert code == 2 and message in errors and errors.startswith("doctor.py: ") and "Traceback" not in errors


def test_a_table_whose_files_are_all_elsewhere_is_1(examine, folder):
    """The first file that was looked for is told, and data_root; a table that is not there is 2."""
    moved = (folder / "clips.csv").read_text().replace("a.mp4", "old/a.mp4")
    moved = "".join(line for line in moved.splitlines(keepends=True) if line.startswith(("path", "old/")))
    (folder / "moved.csv").write_text(moved)
    code, out, _, _ = examine(table="moved.csv")
    assert code == 1 and "old/a.mp4' does not exist; set dataset.data_root" in out
    assert examine("--dataset.data-root", folder, table="moved.csv")[0] == 1
    (folder / "old").mkdir()
    (folder / "old/a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    assert examine("--dataset.data-root", folder, table="moved.csv")[0] == 0
    code, _, errors, _ = examine(table="none.csv")
    assert code == 2 and "none.csv" in errors


def test_the_command_runs_from_any_folder(folder, tmp_path):
    """As the documents print it; the exit code is the process'."""
    command = [sys.executable, str(ROOT / "tools/doctor.py"), str(folder / "clips.csv")]
    options = ["--config", str(folder / "config.py"), "--decode", "0"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/doctor/clips/report.html").is_file()
