"""The house rules that a program can check: import direction, light imports, no site leftovers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opensora_like"
LEVELS = [
    {"registry", "rng", "runtime", "settings", "settings_open_sora", "config", "config_file", "cli", "publish"},
    {"schedulers", "models", "datasets"},
    {"conditioning", "boosters", "checkpoint"},
    {"training", "evaluation", "preparation"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
# rooms of one level are ignorant of each other, but for these: (who imports, what)
SIDEWAYS = {("checkpoint", "boosters"), ("preparation", "training")}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> set[str]:
    """Rooms of this package that `file` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            names |= {f"opensora_like.{a.name}" for a in node.names} if node.module == "opensora_like" else set()
            names |= {node.module} if parts[0] == "opensora_like" and len(parts) > 1 else set()
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("opensora_like.")}
    return {name.split(".")[1] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    """A room imports rooms of lower levels only; within the lowest level anything goes."""
    own = room_of(file)
    if own == "__init__":
        return
    for other in imported_rooms(file) - {own}:
        fine = LEVEL[other] < LEVEL[own] or LEVEL[own] == LEVEL[other] == 0 or (own, other) in SIDEWAYS
        assert fine, f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"


def imports_without(module: str, *blocked: str) -> subprocess.CompletedProcess:
    """Import `module` in a fresh interpreter in which `blocked` cannot be imported."""
    code = f"import sys\nfor name in {list(blocked)!r}: sys.modules[name] = None\nimport {module}\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


HEAVY = ["colossalai", "deepspeed", "transformers", "diffusers", "av", "wandb", "tensornvme", "flash_attn", "ray"]


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("opensora_like.models.mmdit.model", [*HEAVY, "pandas", "pyarrow"]),
        ("opensora_like.boosters.colossalai", [*HEAVY, "pandas"]),
        ("opensora_like.training.trainer", [*HEAVY, "pandas"]),
        ("opensora_like.datasets.plan", [*HEAVY, "torch", "pandas"]),
        ("opensora_like.config", [*HEAVY, "pandas"]),
        ("tools.meta", ["torch", "transformers", "diffusers", "colossalai"]),
    ],
)
def test_light_imports(module: str, blocked: list[str]) -> None:
    """What a module does not need, it does not import."""
    done = imports_without(module, *blocked)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_are_small() -> None:
    """A file is one room (400 lines, models 700), a function fits a screen (60 lines)."""
    too_long = []
    for file in [*FILES, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]:
        text = file.read_text()
        limit = 700 if "models" in file.parts else 400
        if len(text.splitlines()) > limit:
            too_long.append(f"{file.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60 + _docstring_lines(node):
                    too_long.append(f"{file.name}:{node.name}: {lines} lines")
    assert not too_long


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    doc = ast.get_docstring(node, clean=False)
    return len(doc.splitlines()) if doc else 0


def test_no_site_paths_and_no_bare_except() -> None:
    """Nothing of one machine stands in the tree, and no error is swallowed by a bare except."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    tracked = [ROOT / name for name in listed] or FILES
    for file in tracked:
        if file.suffix in (".py", ".md", ".txt", ".sh", ".toml") and file.exists():
            text = file.read_text()
            assert not re.search(r"/(root|home|mnt|work)/\w", text), f"{file}: a path of one machine"
            assert not re.search(r"^\s*except\s*:", text, re.M), f"{file}: bare except"
