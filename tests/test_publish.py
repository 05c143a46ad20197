"""A published file has its name only once it is whole, and an error leaves nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from opensora_like.publish import DRAFT, is_draft, staged


def test_appears_at_the_end_and_replaces(tmp_path: Path) -> None:
    """Until the end the old content is there; the draft keeps the suffix, by which writers choose a format."""
    target = tmp_path / "table.csv"
    target.write_text("old")
    with staged(target) as draft:
        draft.write_text("new")
        assert target.read_text() == "old" and draft.suffix == ".csv" and is_draft(draft) and not is_draft(target)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "new")]


def test_an_error_leaves_the_old_and_no_draft(tmp_path: Path) -> None:
    """Whatever goes wrong while it is written."""
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), staged(target) as draft:
        draft.write_text("half")
        1 / 0  # noqa: B018
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "old")]


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    """A target of one process has one draft."""
    (tmp_path / f"{DRAFT}table.csv").write_text("half of another, longer one")
    with staged(tmp_path / "table.csv") as draft:
        draft.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table.csv", "whole")]


def test_shared_targets_have_drafts_of_their_own(tmp_path: Path) -> None:
    """Two that publish the same file at once each write their own, and both succeed."""
    target, both = tmp_path / "one.bin", threading.Barrier(2, timeout=300)

    def publish(content: bytes) -> None:
        with staged(target, shared=True) as draft:
            draft.write_bytes(content)
            both.wait()

    threads = [threading.Thread(target=publish, args=(bytes([n]) * 1000,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in (b"\0" * 1000, b"\1" * 1000)
    assert list(tmp_path.iterdir()) == [target]
