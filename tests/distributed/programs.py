"""Runs a program of this folder as users run theirs, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def found_by(program: str, folder: Path, *, file: str = "facts.json", timeout: float = 500) -> Any:
    """Facts of ``tests/distributed/PROGRAM.py FOLDER``, which starts its processes itself.

    Args:
        file: json that it leaves in `folder`.
        timeout: seconds.
    """
    command = [sys.executable, str(ROOT / f"tests/distributed/{program}.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / file).read_text())
