"""Cut a table into parquet shards; the same command as tools/shard.py, which describes it."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/shard.py"), run_name="__main__")
