"""Tables of any format are read alike, and a table that cannot be trained from says where and why."""

import json
import math
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_like.datasets.table import read_table, table_of

_SIZES = ("num_frames", "height", "width", "fps")
ROWS = [
    {
        "path": "a.mp4",
        "text": 'says "hi",\ntwice',
        **dict(zip(_SIZES, (97, 480, 832, 23.976), strict=True)),
        "score_vmafmotion": 3.5,
    },
    {
        "path": "b.png",
        "text": "0123",
        **dict(zip(_SIZES, (1, 720, 1280, None), strict=True)),
        "latents_path": "b.safetensors",
    },
    {"path": "\u00fc/c.mp4", "text": "", **dict(zip(_SIZES, (33, 256, 256, 30), strict=True)), "name": "007"},
]
NAMES = list(dict.fromkeys(name for row in ROWS for name in row))


def _columns(rows=ROWS):
    return {name: [row.get(name) for row in rows] for name in NAMES}


def _write(folder, kind, rows=ROWS):
    file = folder / f"clips.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(_columns(rows)), file, row_group_size=2)
    elif kind == "csv":
        cells = [[f'"{v}"'.replace('"hi"', '""hi""') if isinstance(v, str) else v for v in r] for r in _cells(rows)]
        lines = [",".join("" if v is None else str(v) for v in row) for row in [NAMES, *cells]]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # with the mark that spreadsheets write
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _cells(rows):
    return [[row.get(name) for name in NAMES] for row in rows]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "jsonl"])
def test_formats_give_the_same_table(tmp_path, kind):
    """Columns, rows, notes and fingerprint are the same from every format, quotes, line breaks and umlauts included."""
    table, expected = read_table(_write(tmp_path, kind)), table_of(_columns())
    assert table.fingerprint == expected.fingerprint
    assert table.num_rows == 3 and table.num_frames.tolist() == [97, 1, 33] and table.num_frames.dtype == np.int64
    np.testing.assert_array_equal(table.fps, [23.976, math.nan, 30])
    assert table.resolution.tolist() == [480 * 832, 720 * 1280, 256 * 256]
    np.testing.assert_allclose(table.aspect_ratio, [480 / 832, 720 / 1280, 1])
    first, image, last = (table.row(i) for i in range(3))
    assert first == ROWS[0]
    assert math.isnan(image.pop("fps")) and image == {k: v for k, v in ROWS[1].items() if v is not None}
    assert last == ROWS[2]
    assert table.notes == ("1 of 3 rows have an empty text; they train without a caption",)


def test_fingerprint_follows_what_decides_the_order():
    """It ignores captions, derived columns and arrow's chunks, and changes with order, count and each number."""
    same = table_of(_columns()).fingerprint
    chunked = pa.concat_tables([pa.table(_columns()).slice(0, 1), pa.table(_columns()).slice(1, 2)])
    assert table_of(chunked).fingerprint == same
    assert table_of(_columns() | {"text": ["x", "y", "z"], "resolution": [0, 0, 0]}).fingerprint == same
    assert table_of(_columns(ROWS[::-1])).fingerprint != same
    assert table_of(_columns(ROWS[:2])).fingerprint != same
    for name in ("path", "num_frames", "height", "width", "fps"):
        edited = [dict(row) for row in ROWS]
        edited[2][name] = "d.mp4" if name == "path" else 25
        assert table_of(_columns(edited)).fingerprint != same, name
    moved = [dict(ROWS[0], path="ab"), dict(ROWS[1], path="c")], [dict(ROWS[0], path="a"), dict(ROWS[1], path="bc")]
    assert table_of(_columns(moved[0])).fingerprint != table_of(_columns(moved[1])).fingerprint


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "jsonl"])
def test_a_wrong_type_names_row_and_value(tmp_path, kind):
    """A text among the numbers is found in every format."""
    rows = [dict(row, num_frames=str(row["num_frames"])) for row in ROWS]
    assert read_table(_write(tmp_path, kind, rows)).num_frames.tolist() == [97, 1, 33]  # digits as text are no harm
    rows[2]["num_frames"] = "many"
    with pytest.raises(ValueError, match=r"clips.*: num_frames='many' in row 2 \(the first is 0\) is not a number"):
        read_table(_write(tmp_path, kind, rows))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", None, r"height=nan in row 1 \(the first is 0; 1 of 3 rows\) is missing; .*tools/meta.py"),
        ("width", math.nan, r"width=nan in row 1 .* is missing"),
        ("num_frames", -3, r"num_frames=-3 in row 1 .* is negative"),
        ("num_frames", 2.5, r"num_frames=2.5 in row 1 .* is no whole number"),
        ("height", math.inf, r"height=inf in row 1 .* is no whole number"),
        ("fps", -24.0, r"fps=-24 in row 1 .* is negative"),
        ("path", None, r"no path in row 1"),
        ("path", "", r"no path in row 1"),
        ("path", 5, r"'<memory>': path=5 is not text"),
        ("height", True, r"height=True in row 1 .* is not a number"),
        ("score_vmafmotion", "high", r"score_vmafmotion='high' in row 1"),
    ],
)
def test_a_value_that_cannot_be_names_its_row(name, value, message):
    """Missing, negative, broken and mistyped values are ValueErrors with the row and how many there are."""
    rows = [dict(row) for row in ROWS]
    rows[1][name] = value
    columns = _columns(rows)
    if name == "path" and value == 5:
        columns["path"] = [5, 6, 7]
    if value is True:
        columns["height"] = [False, True, True]
        message = message.replace("height=True in row 1", "height=False in row 0")
    with pytest.raises(ValueError, match=message):
        table_of(columns)


def test_missing_columns_are_named_with_the_tool_that_adds_them():
    """Numbers come from tools/meta.py, path and text from the user."""
    with pytest.raises(ValueError, match=r"no column \['num_frames', 'height', 'width', 'fps'\].*run tools/meta.py"):
        table_of({"path": ["a"], "text": ["b"]})
    columns = _columns()
    del columns["text"]
    with pytest.raises(ValueError, match=r"no column \['text'\].*; add \['text'\] to the table"):
        table_of(columns)


def test_files_that_hold_no_table_say_so(tmp_path):
    """No file, an empty file, no rows, another format, broken contents and repeated columns."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    cases = {
        "empty.csv": (b"", "is an empty file"),
        "header.csv": (",".join(NAMES).encode() + b"\n", "has a header and 0 rows"),
        "clips.xlsx": (b"PK", "is not one of the files that can be read"),
        "broken.parquet": (b"PAR1 not really", "cannot be parsed as parquet"),
        "broken.json": (b'{"path": ', "cannot be parsed as json"),
        "columns.json": (b'{"path": {"0": "a"}}', "not a list of records"),
        "broken.jsonl": (b'{"path": "a"}\n{"path": \n', "cannot be parsed as jsonl"),
        "wide.csv": (",".join(NAMES).encode() + b"\n1,2\n", "cannot be parsed as csv"),
        "latin.csv": (",".join(NAMES).encode() + b"\n\xfc,b,1,2,3,4,5,6,7\n", "cannot be parsed as csv"),
        "twice.csv": (",".join([*NAMES, "text"]).encode() + b"\n", r"more than one column named \['text'\]"),
    }
    for name, (contents, message) in cases.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
    with pytest.raises(ValueError, match="is not one of the files that can be read"):
        read_table(tmp_path)


def test_odd_but_usable_rows_are_counted_in_notes():
    """Repeated paths, empty captions and sizes of 0 are told, not refused."""
    rows = [ROWS[0], dict(ROWS[0], text=None), dict(ROWS[0], text=" \n", height=0)]
    table = table_of(_columns(rows))
    assert [note.split()[0] for note in table.notes] == ["2", "2", "1"]
    assert table.row(1)["text"] == "" and math.isnan(table.fps[0]) is False


def test_rows_outside_are_an_error():
    """An index is checked at both ends: a negative one would silently be another clip."""
    table = table_of(_columns())
    for index in (-1, 3):
        with pytest.raises(IndexError, match="which has rows 0 to 2"):
            table.row(index)


def test_forked_workers_read_rows():
    """A process forked after reading sees the same rows."""
    table = table_of(_columns())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_ReadText(table), [0, 2]) == [ROWS[0]["text"], ""]


class _ReadText:
    def __init__(self, table):
        self.table = table

    def __call__(self, index):
        return self.table.row(index)["text"]
