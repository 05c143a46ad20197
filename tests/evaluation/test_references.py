"""References are files or addresses; what is fetched is whole, kept, within a limit, and an image or a video."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from opensora_like.evaluation.references import fetch, find_reference
from tests.evaluation.local_server import Answer, serving


def test_files_are_found_as_written_or_beside_the_table(tmp_path: Path) -> None:
    """A path that exists is taken; else the one beside the csv; else the error names both places."""
    (tmp_path / "a.png").write_bytes(b"x")
    options = {"folder": tmp_path / "cache", "max_bytes": 10}
    table = str(tmp_path / "prompts.csv")
    assert find_reference("a.png", table_path=table, **options) == str(tmp_path / "a.png")
    assert find_reference(str(tmp_path / "a.png"), table_path=None, **options) == str(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"ref='gone.png' does not exist, nor is it beside .*prompts.csv"):
        find_reference("gone.png", table_path=table, **options)
    with pytest.raises(ValueError, match=r"ref='ftp://a/b.png': only http and https"):
        find_reference("ftp://a/b.png", table_path=None, **options)
    assert not (tmp_path / "cache").exists()


def test_an_address_is_fetched_once(tmp_path: Path) -> None:
    """The bytes arrive under a name with the right suffix, from the address or from the content type, and stay."""
    asked = []

    def answer(path: str, _: object) -> Answer:
        asked.append(path)
        return Answer(body=b"pixels of " + path.encode(), content_type="image/png")

    with serving(answer) as url:
        by_name, by_type = (fetch(f"{url}/{p}", tmp_path, max_bytes=100) for p in ("a.jpg?size=2", "picture"))
        assert fetch(f"{url}/a.jpg?size=2", tmp_path, max_bytes=100) == by_name
    assert (by_name.suffix, by_type.suffix) == (".jpg", ".png")
    assert by_name.read_bytes() == b"pixels of /a.jpg?size=2"
    assert asked == ["/a.jpg?size=2", "/picture"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(404, b"", "image/png"), "a.png.: the server answered 404 Not Found"),
        (Answer(200, b"x" * 101, "image/png"), "has 101 bytes, 100 are allowed; raise --max-reference-mb"),
        (Answer(200, b"x" * 50, "image/png", announced=80), "the connection ended after 50 of 80 bytes"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(tmp_path: Path, answer: Answer, message: str) -> None:
    """The error names the address and the numbers; no file is there that could be taken for a whole one."""
    with serving(lambda *_: answer) as url, pytest.raises(ValueError, match=message):
        fetch(f"{url}/a.png", tmp_path, max_bytes=100)
    assert not list(tmp_path.iterdir())


def test_pages_and_absent_servers_are_named(tmp_path: Path) -> None:
    """Neither image nor video: the suffix and the type; nobody there: the reason."""
    with serving(lambda *_: Answer(200, b"<html>", "text/html")) as url:
        with pytest.raises(ValueError, match=r"its name ends in '.php', the server calls it 'text/html'"):
            fetch(f"{url}/a.php", tmp_path, max_bytes=100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match=r"cannot be fetched: .*refused"):
            fetch(f"http://127.0.0.1:{free.getsockname()[1]}/a.png", tmp_path, max_bytes=100)
