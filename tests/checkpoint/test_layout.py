"""Checkpoint folders: complete means published, the newest is found, a kill leaves nothing half visible."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_like.checkpoint import layout
from opensora_like.publish import DRAFT


def stage(run: Path, name: str, text: str = "{}") -> None:
    folder = layout.staging_folder(run, name)
    folder.mkdir(parents=True)
    (folder / layout.STATE_FILE).write_text(text)


def published(run: Path, *steps: int) -> list[Path]:
    made = []
    for step in steps:
        name = layout.checkpoint_name(step // 10, step)
        stage(run, name)
        made.append(layout.publish(run, name))
    return made


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    """A staging folder, a folder without state and a file are no checkpoints; the newest is by number, not by text."""
    made = published(tmp_path, 9, 10, 100)
    stage(tmp_path, "epoch9-global_step999")
    (tmp_path / "epoch0-global_step5").mkdir()
    (tmp_path / "epoch0-global_step6").write_text("")
    assert layout.complete_checkpoints(tmp_path) == made
    assert layout.find_checkpoint("latest", tmp_path) == made[-1]
    assert layout.find_checkpoint(str(tmp_path / "epoch*-global_step*"), tmp_path) == made[-1]
    assert layout.find_checkpoint(str(made[0]), tmp_path) == made[0]
    assert layout.find_checkpoint(str(tmp_path), Path("x")) == made[-1]


@pytest.mark.parametrize("load", ["latest", "nowhere", "no*where"])
def test_nothing_to_load_is_named(tmp_path: Path, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says what was looked for."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=load.replace("*", r"\*")):
        layout.find_checkpoint(load, tmp_path)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    """keep_n_latest counts complete checkpoints by step; other files stay; 0 is refused."""
    made = published(tmp_path, 2, 9, 10, 11)
    (tmp_path / "metrics.jsonl").write_text("")
    layout.remove_old(tmp_path, -1)
    assert layout.complete_checkpoints(tmp_path) == made
    layout.remove_old(tmp_path, 2)
    assert layout.complete_checkpoints(tmp_path) == made[2:]
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith(".")) == []
    with pytest.raises(ValueError, match="keep_n_latest=0"):
        layout.remove_old(tmp_path, 0)


@pytest.mark.parametrize(("keep", "keep_every"), [(-2, 0), (1, -1), (-1, 100)])
def test_retention_that_cannot_be_is_named(keep: int, keep_every: int) -> None:
    """Neither can be below its least value, and what nothing removes need not be kept."""
    with pytest.raises(ValueError, match=f"keep_.*={keep}|keep_every={keep_every}"):
        layout.check_kept(keep, keep_every)
    layout.check_kept(2, 100)


def test_what_an_earlier_start_left_is_older(tmp_path: Path) -> None:
    """Gone on with from update 2, the run's newest is 3 and not 9: it is found, and it is what retention keeps."""
    published(tmp_path, 2, 9)
    assert layout.next_start(tmp_path) == 1
    name = layout.checkpoint_name(0, 3)
    stage(tmp_path, name, '{"start": 1}')
    newest = layout.publish(tmp_path, name)
    assert [layout.step_of(f) for f in layout.complete_checkpoints(tmp_path)] == [2, 9, 3]
    for load in ("latest", str(tmp_path), str(tmp_path / "epoch*-global_step*")):
        assert layout.find_checkpoint(load, tmp_path) == newest
    assert layout.next_start(tmp_path) == 2
    layout.remove_old(tmp_path, 1)
    assert layout.complete_checkpoints(tmp_path) == [newest]


def test_starts_of_several_runs_are_not_compared(tmp_path: Path) -> None:
    """A pattern over two runs means the largest update."""
    (last,) = published(tmp_path / "a", 9)
    stage(tmp_path / "b", "epoch0-global_step3", '{"start": 1}')
    layout.publish(tmp_path / "b", "epoch0-global_step3")
    assert layout.find_checkpoint(str(tmp_path / "*/epoch*"), tmp_path) == last


def test_replacing_a_checkpoint_survives_a_kill_between_the_renames(tmp_path: Path) -> None:
    """Saving the same step again replaces it; if killed half way, `recover` brings the old one back."""
    (old,) = published(tmp_path, 10)
    name = old.name
    stage(tmp_path, name, '{"second": 1}')
    assert "second" in (layout.publish(tmp_path, name) / layout.STATE_FILE).read_text()
    old.rename(tmp_path / f"{layout.REPLACED}{name}")  # the kill
    stage(tmp_path, name)
    assert layout.complete_checkpoints(tmp_path) == []
    layout.recover(tmp_path)
    assert layout.complete_checkpoints(tmp_path) == [old]
    assert not list(tmp_path.glob(".*"))


def test_all_drafts_that_a_kill_left_go(tmp_path: Path) -> None:
    """A checkpoint under way, the link to the newest, and a file of metrics; what is published stays."""
    stage(tmp_path, layout.checkpoint_name(0, 2))
    (tmp_path / f"{layout.STAGING}{layout.LATEST}").symlink_to("epoch0-global_step1")
    (tmp_path / f"{DRAFT}metrics.jsonl").write_text("half")
    (tmp_path / "metrics.jsonl").write_text("whole")
    assert len(list(tmp_path.glob(".*"))) == 3
    layout.recover(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
