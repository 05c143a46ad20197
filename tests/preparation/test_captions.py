"""Lists of clips: every source of captions, the frames of a clip, names that cannot collide, what is wrong where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_like.preparation.captions import Clip, list_clips


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos by name only: listing does not open them."""
    for name in ("b.mp4", "a.mp4", "sub/c.mov", ".hidden/d.mp4", "note.txt"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("note" if name == "note.txt" else "")
    return tmp_path / "videos"


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def texts(folder: Path, **options) -> dict[str, str | None]:
    return {clip.key: clip.text for clip in list_clips(folder, missing="empty", **options).clips}


ENTRIES = [
    {"file_name": "a.mp4", "width": 1280, "height": 720, "start_frame": 0, "end_frame": 121, "vila_caption": "an a"},
    {"file_name": "b.mp4", "width": 1280, "height": 720, "start_frame": 3, "end_frame": 12, "vila_caption": "a b"},
]


@pytest.mark.parametrize("wrapped", [lambda e: e, lambda e: {"items": e}, lambda e: {"data": e, "version": 1}])
def test_meta_json_says_which_clips_there_are(folder, wrapped):
    """A list, also under a key: files, frames and captions are taken as written; other videos are told of."""
    write(folder / "meta.json", wrapped(ENTRIES))
    listing = list_clips(folder)
    assert listing.clips == (Clip("a.mp4", "an a", 0, 121), Clip("b.mp4", "a b", 3, 12))
    assert listing.notes == ("1 videos are in no list and left out, ['sub/c.mov']",)
    assert [clip.stem for clip in listing.clips] == ["a", "b"]


def test_order_of_keys(folder):
    """Of several captions the same one is taken as published; a field that is asked for is the only one."""
    every = {"text": "4", "caption": "3", "gemini_v2_caption": "2", "vila_caption": "1", "own": "5"}
    for number, key in enumerate(("vila_caption", "gemini_v2_caption", "caption", "text")):
        write(folder / "meta.json", [{"file_name": "a.mp4", **every}])
        assert texts(folder) == {"a.mp4": str(number + 1)}
        assert texts(folder, field="own") == {"a.mp4": "5"}
        every.pop(key)
    write(folder / "meta.json", [{"file_name": "a.mp4", "own": "5"}])
    assert texts(folder) == {"a.mp4": ""}


def test_several_clips_of_one_file(folder):
    """Clips of one file are told apart by their frames, in their names, too; two that are the same are an error."""
    cuts = [{"path": "a.mp4", "start_frame": s, "end_frame": e, "text": f"{s}"} for s, e in ((0, 8), (9, 20))]
    write(folder / "meta.json", cuts)
    clips = list_clips(folder).clips
    assert [(clip.key, clip.stem) for clip in clips] == [("a.mp4#0-8", "a_0-8"), ("a.mp4#9-20", "a_9-20")]
    write(folder / "meta.json", [*cuts, cuts[0]])
    with pytest.raises(ValueError, match=r"'a\.mp4#0-8' and 'a\.mp4#0-8' would both be called 'a_0-8'"):
        list_clips(folder)


def test_files_of_one_name_in_two_folders(folder):
    """Folders and other suffixes are part of a name, so that files made of clips do not overwrite each other."""
    write(folder / "sub/a.mp4", "")
    write(folder / "a.mov", "")
    stems = {clip.file: clip.stem for clip in list_clips(folder, missing="empty").clips}
    assert stems == {
        "a.mov": "a.mov",
        "a.mp4": "a",
        "b.mp4": "b",
        "sub/a.mp4": "sub__a",
        "sub/c.mov": "sub__c.mov",
    }
    write(folder / "sub__a.mp4", "")
    with pytest.raises(ValueError, match=r"'sub/a\.mp4' and 'sub__a\.mp4' would both be called 'sub__a'"):
        list_clips(folder, missing="empty")


def test_lists_below_the_folder(folder):
    """A meta.json names files from where it is."""
    write(folder / "sub/meta.json", [{"file_name": "c.mov", "caption": "a c"}])
    assert texts(folder) == {"sub/c.mov": "a c"}


def test_tables(folder, tmp_path):
    """csv, parquet, json and jsonl lists, in the folder under a known name or anywhere."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"file_name": "a.mp4", "caption": "an, a", "start_frame": 2}, {"file_name": "b.mp4", "caption": "a b"}]
    csv = 'file_name,caption,start_frame\na.mp4,"an, a",2\nb.mp4,a b,\n'
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    sources = [
        write(tmp_path / "list.csv", csv),
        write(tmp_path / "list.json", rows),
        write(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows))),
        tmp_path / "list.parquet",
    ]
    want = (Clip("a.mp4", "an, a", 2), Clip("b.mp4", "a b"))
    for source in sources:
        assert list_clips(folder, table=source).clips == want, source
    write(folder / "captions.csv", csv)
    assert list_clips(folder).clips == want and list_clips(folder, form="table").clips == want


def test_captions_beside_the_videos(folder):
    """jsonl before json before txt; of lines the first that is whole; the frames of a clip may stand there, too."""
    write(folder / "a.jsonl", '\n{"cut off\n{"start_frame": 4, "any_caption": "an a"}\n{"caption": "later"}\n')
    write(folder / "a.json", {"caption": "not this"})
    write(folder / "b.json", {"caption": "a b", "end_frame": 7})
    write(folder / "sub/c.txt", " a c\n")
    clips = list_clips(folder).clips
    assert clips == (Clip("a.mp4", "an a", 4), Clip("b.mp4", "a b", 0, 7), Clip("sub/c.mov", "a c"))
    assert texts(folder, form="json") == {"a.mp4": "not this", "b.mp4": "a b", "sub/c.mov": ""}
    assert texts(folder, form="txt") == {"a.mp4": "", "b.mp4": "", "sub/c.mov": "a c"}
    write(folder / "b.json", '"a b alone"')
    assert texts(folder, form="sidecar")["b.mp4"] == "a b alone"


def test_lines_for_several_videos(folder):
    """A file of lines that serves all samples of a video gives each the line with its name."""
    write(folder / "v_sample0.mp4", "")
    lines = [{"file_name": f"v_sample{n}.mp4", "internvl": f"sample {n}"} for n in (1, 0)]
    write(folder / "v_internvl.json", "\n".join(map(json.dumps, lines)))
    assert texts(folder, form="jsonl", field="internvl")["v_sample0.mp4"] == "sample 0"


def test_no_caption(folder):
    """Without a caption a clip has a problem, is left out, or is called after its file or nothing, as told."""
    write(folder / "a.txt", "an a")
    found = list_clips(folder)
    assert [bool(clip.problem) for clip in found.clips] == [False, True, True] and "--missing_caption" in found.clips[
        1
    ].problem
    found = list_clips(folder, missing="skip")
    assert [clip.file for clip in found.clips] == ["a.mp4"] and found.notes == (
        "2 clips without a caption are skipped",
    )
    write(folder / "a_b_c.mp4", "")
    assert {c.file: c.text for c in list_clips(folder, missing="stem").clips}["a_b_c.mp4"] == "a b c"
    with pytest.raises(ValueError, match="missing_caption='none' is not one of"):
        list_clips(folder, missing="none")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (3, r"entry 0 of meta\.json has none of"),
        ({"caption": "x"}, "has none of"),
        ({"file_name": "../secret.mp4"}, "names a file outside of the folder"),
        ({"file_name": "/etc/secret.mp4"}, "names a file outside of the folder"),
        ({"file_name": "a.mp4", "start_frame": -1}, "start_frame=-1 is not a whole number"),
        ({"file_name": "a.mp4", "end_frame": "many"}, "end_frame='many' is not a number"),
        ({"file_name": "a.mp4", "end_frame": True}, "end_frame=True is not a whole number"),
        ({"file_name": "a.mp4", "start_frame": 5, "end_frame": 4}, "end_frame=4 is before start_frame=5"),
    ],
)
def test_an_entry_that_makes_no_sense_is_one_clips_problem(folder, entry, problem):
    """The other clips of the list stay."""
    import re

    write(folder / "meta.json", [entry, {"file_name": "b.mp4", "caption": "a b"}])
    clips = list_clips(folder).clips
    assert len(clips) == 2 and [c.file for c in clips if not c.problem] == ["b.mp4"]
    assert re.search(problem, next(c.problem for c in clips if c.problem))


def test_a_broken_file_beside_a_video_is_its_problem(folder):
    """Neither json that is cut off nor bytes that are no text end the run."""
    write(folder / "a.json", '{"caption": ')
    (folder / "b.txt").write_bytes(b"\xff\xfe\xff")
    write(folder / "sub/c.json", [1])
    problems = [clip.problem for clip in list_clips(folder).clips]
    assert all("cannot be read" in problem for problem in problems)


def test_what_cannot_be_listed_says_so(folder, tmp_path):
    """Errors name the file, and what is possible."""
    for options, kind, message in (
        ({"form": "meta_json"}, FileNotFoundError, r"meta\.json' does not exist"),
        ({"form": "table"}, FileNotFoundError, r"none of \['captions\.csv'"),
        ({"form": "sidecars"}, ValueError, "caption_format='sidecars' is not one of"),
        ({"table": tmp_path / "x.csv"}, FileNotFoundError, r"x\.csv' does not exist"),
        ({"table": write(tmp_path / "x.txt", "")}, ValueError, r"is not one of \['\.csv'"),
        ({"table": write(tmp_path / "x.json", "{")}, ValueError, "cannot be read"),
        ({"table": write(tmp_path / "y.json", {"a": 1})}, ValueError, "it holds no list"),
        ({"table": tmp_path / "y.json", "form": "txt"}, ValueError, "remove one"),
    ):
        with pytest.raises(kind, match=message):
            list_clips(folder, **options)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list_clips(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no videos"):
        list_clips(tmp_path / "empty")
