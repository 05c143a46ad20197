"""Each recorded file is read by a test, and the guide to them names it and only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/recorded_numbers.md").read_text()
RECORDED = sorted({path.stem for path in (ROOT / "tests/golden").iterdir()})
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p.name != Path(__file__).name)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_file_is_used_and_explained(name: str) -> None:
    """A file that nothing reads proves nothing; one that the guide leaves out is not found."""
    assert name in TESTS
    assert f"`{name.removesuffix('_a')}`" in GUIDE


def test_the_guide_names_what_exists() -> None:
    """Tests are files; what takes the recorded inputs is spelled as in the package."""
    for path in set(re.findall(r"`(tests/[\w/]+\.py)`", GUIDE)):
        assert (ROOT / path).is_file(), path
    files = list((ROOT / "opensora_like").rglob("*.py"))
    known = {
        word for path in files for word in (*path.relative_to(ROOT).with_suffix("").parts, *_words(path.read_text()))
    }
    rows = [row.split("|") for row in GUIDE.splitlines() if row.count("|") == 5]
    for entry in (code for row in rows for code in re.findall(r"`([^`]+)`", row[2])):
        assert not (unknown := _words(entry) - known - {"FOLDER"}), (entry, unknown)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]{3,}", text))
