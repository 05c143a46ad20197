"""Cut a table into parquet shards, which --dataset.memory_efficient True reads without holding the table.

python tools/shard.py clips.parquet [NUM_SHARDS] [--output FOLDER] [--replace]    writes clips/00001.parquet, ...
python tools/shard.py clips --verify                                              reads all shards and compares them
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.shards import open_shards


def main() -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="parquet, or another table that fits into memory")
    parser.add_argument("num_shards", nargs="?", type=int, help="default: shards of 100,000 rows")
    parser.add_argument("--output", help="folder of the shards; default: the table's path without its suffix")
    parser.add_argument("--replace", action="store_true", help="put them in the place of older shards")
    parser.add_argument("--verify", action="store_true", help="write nothing, compare shards with their manifest")
    args = parser.parse_args()
    began = time.perf_counter()
    try:
        if args.verify:
            table = open_shards(args.table)
            table.verify()
        else:
            table = write_shards(args.table, num_shards=args.num_shards, folder=args.output, replace=args.replace)
    except (ValueError, OSError) as problem:
        print(f"shard.py: {problem}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    print(
        f"{'verified' if args.verify else 'wrote'} {len(table.shards)} shards in {table.path} rows {table.num_rows} "
        f"fingerprint {table.fingerprint} seconds {seconds:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
