"""Measure the clips of a table; the same command as tools/meta.py, which describes it."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/meta.py"), run_name="__main__")
