"""Turn a training checkpoint into safetensors; the same command as tools/zero_to_bf16.py, which describes it."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools/zero_to_bf16.py"), run_name="__main__")
