"""The command that cuts tables works as printed in the documents, from any folder."""

import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_like.datasets.shards import open_shards
from opensora_like.datasets.table import read_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "dataset.parquet"
    columns = {"path": [f"{i}.mp4" for i in range(40)], "text": ["a clip"] * 40, "num_frames": [33] * 40}
    columns |= {"height": [256] * 40, "width": [256] * 40, "fps": [24.0, math.nan] * 20}
    pq.write_table(pa.table(columns), file)
    return file


def _run(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_seeds_command_writes_shards(table, tmp_path):
    """scripts/cnv/shard.py TABLE writes TABLE's folder; a second argument counts the shards; a repeat is refused."""
    done = _run("scripts/cnv/shard.py", table, cwd=tmp_path)
    assert done.returncode == 0 and "wrote 1 shards" in done.stdout, done.stderr
    assert (tmp_path / "dataset/00001.parquet").is_file()
    assert open_shards(table).fingerprint == read_table(table).fingerprint
    again = _run("scripts/cnv/shard.py", table, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("shard.py: ") and "--replace" in again.stderr
    assert "Traceback" not in again.stderr
    done = _run("scripts/cnv/shard.py", "dataset.parquet", 3, "--output", "three", cwd=tmp_path)
    assert done.returncode == 0 and len(open_shards(tmp_path / "three").shards) == 3


def test_verify_reads_every_row(table, tmp_path):
    """tools/shard.py --verify is 0 for whole shards, and 2 with the name of a shard that was changed."""
    assert _run("tools/shard.py", table, 2, cwd=tmp_path).returncode == 0
    assert "verified 2 shards" in _run("tools/shard.py", "dataset", "--verify", cwd=tmp_path).stdout
    shard = tmp_path / "dataset/00002.parquet"
    content = bytearray(shard.read_bytes())
    content[60] ^= 0xFF  # inside of the first column's data
    shard.write_bytes(content)
    done = _run("tools/shard.py", "dataset", "--verify", cwd=tmp_path)
    assert done.returncode == 2 and "00002.parquet" in done.stderr and "Traceback" not in done.stderr
