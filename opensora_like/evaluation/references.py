"""References of prompts: local files as they are, addresses fetched into a folder, within a limit of size."""

from __future__ import annotations

import hashlib
import http.client
import mimetypes
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from opensora_like.datasets.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_file
from opensora_like.publish import staged

CHUNK = 1 << 20


def find_reference(
    ref: str, *, table_path: str | None, folder: Path, max_bytes: int, timeout_seconds: float = 60.0
) -> str:
    """The local file that `ref` means.

    Args:
        ref: a path (as written, or beside `table_path`), or an http(s) address.
        folder: where fetched files are kept; one that is there is not fetched again.
        max_bytes: of a fetched file.

    Raises:
        FileNotFoundError: no such local file.
        ValueError: an address that cannot be fetched, is too large, or is neither image nor video.
    """
    if urlsplit(ref).scheme in ("http", "https"):
        return str(fetch(ref, folder, max_bytes=max_bytes, timeout_seconds=timeout_seconds))
    if "://" in ref:
        raise ValueError(f"ref={ref!r}: only http and https addresses are fetched; give one, or a local file")
    path = find_file(ref, table_path=table_path) if table_path else ref
    if not Path(path).is_file():
        beside = f", nor is it beside {table_path!r}" if table_path else ""
        raise FileNotFoundError(f"ref={ref!r} does not exist{beside}")
    return path


def fetch(url: str, folder: Path, *, max_bytes: int, timeout_seconds: float = 60.0) -> Path:
    """Fetch an image or a video into `folder`, under a name made from the address.

    The file appears by rename, so one that is there is whole, and several processes may fetch the same.

    Raises:
        ValueError: no answer, an answer other than success, more than `max_bytes`, fewer bytes than announced, or
            neither an image nor a video by its name and its content type.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:24]
    found = [p for p in sorted(folder.glob(f"{name}.*")) if p.suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "opensora_like"})  # some servers refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            target = folder / (name + _suffix(url, answer.headers.get_content_type()))
            data = _read(url, answer, max_bytes)
    except urllib.error.HTTPError as problem:
        raise ValueError(f"ref={url!r}: the server answered {problem.code} {problem.reason}") from problem
    except (OSError, http.client.HTTPException) as problem:  # refused, unknown host, timed out, cut off
        reason = getattr(problem, "reason", problem)
        raise ValueError(f"ref={url!r} cannot be fetched: {reason or type(problem).__name__}") from problem
    with staged(target, shared=True) as draft:
        draft.write_bytes(data)
    return target


def _suffix(url: str, content_type: str) -> str:
    """What the file's name should end in: as the address does, or by the type that the server says it is."""
    by_name = PurePosixPath(urlsplit(url).path).suffix.lower()
    for suffix in (by_name, mimetypes.guess_extension(content_type) or ""):
        if suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            return suffix
    raise ValueError(
        f"ref={url!r} is neither an image nor a video: its name ends in {by_name!r}, the server calls it "
        f"{content_type!r}"
    )


def _read(url: str, answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    announced = answer.headers.get("Content-Length")
    size = int(announced) if announced and announced.isdigit() else None
    data = bytearray()
    while (size or 0) <= max_bytes and len(data) <= max_bytes:
        if not (chunk := answer.read(CHUNK)):
            break
        data += chunk
    if max(size or 0, len(data)) > max_bytes:
        raise ValueError(
            f"ref={url!r} has {size or f'more than {max_bytes}'} bytes, {max_bytes} are allowed; "
            "raise --max-reference-mb or take a smaller file"
        )
    if size is not None and len(data) < size:
        raise ValueError(f"ref={url!r}: the connection ended after {len(data)} of {size} bytes; try again")
    return bytes(data)
