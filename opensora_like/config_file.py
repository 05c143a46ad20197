"""Reads config files and command lines into one nested dict, and remembers who set what."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from opensora_like.registry import fit
from opensora_like.settings import KeyPath

CHECKPOINT_NAME = re.compile(r"epoch(\d+)-global_step(\d+)/?$")


class Layer(NamedTuple):
    """One source of settings: a file, or the command line.

    Args:
        paths: every key path that this source sets -> where, "file.py:12" or "--lr 1e-5".
    """

    name: str
    paths: dict[KeyPath, str]


def read_layers(path: Path) -> tuple[dict[str, Any], list[Layer]]:
    """Read a config file with everything it inherits.

    Returns: the merged settings, and the layers in order of rising precedence (bases first).

    Raises:
        FileNotFoundError: the file or one of its bases.
        ValueError: mmengine cannot read or merge it; the message names the file.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r} does not exist{_similar_files(path)}")
    layers = _layers_of(path, ())
    try:
        merged = Config.fromfile(str(path), lazy_import=False, import_custom_modules=False).to_dict()
    except (KeyError, TypeError, SyntaxError, NameError, ValueError, AttributeError) as problem:
        raise ValueError(f"config {str(path)!r} cannot be read: {problem}") from problem
    return merged, layers


def _similar_files(path: Path) -> str:
    """The end of a sentence: files of a near name in the folder or below it, or all of the folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {str(folder)!r} with configs"
    by_name: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        by_name.setdefault(file.name, []).append(str(file))
    near = [file for name in get_close_matches(path.name, by_name, n=3, cutoff=0.75) for file in by_name[name]]
    if not by_name:
        return f"; there is no config in folder {str(folder)!r}, nor below it"
    there = sorted(map(str, folder.glob("*.py"))) or [str(file) for files in by_name.values() for file in files]
    return f"; did you mean {near}?" if near else f"; there are {there[:12]}"


def _layers_of(path: Path, seen: tuple[Path, ...]) -> list[Layer]:
    if path.resolve() in seen:
        raise ValueError(f"config {str(path)!r} inherits from itself through _base_")
    try:
        tree = ast.parse(path.read_text())
    except SyntaxError as problem:
        raise ValueError(f"config {str(path)!r} is not valid Python: line {problem.lineno}: {problem.msg}") from problem
    layers: list[Layer] = []
    own: dict[KeyPath, str] = {}
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        if name == "_base_":
            for base in _literal_bases(node.value, path):
                layers += _layers_of(path.parent / base, (*seen, path.resolve()))
        else:
            own.update({p: f"{path}:{line}" for p, line in _key_paths(node.value, (name,))})
    return [*layers, Layer(str(path), own)]


def _literal_bases(node: ast.expr, path: Path) -> list[str]:
    try:
        bases = ast.literal_eval(node)
    except ValueError as problem:
        raise ValueError(f"config {str(path)!r}: _base_ must be a path or a list of paths") from problem
    bases = [bases] if isinstance(bases, str) else list(bases)
    for base in bases:
        if not (path.parent / base).is_file():
            raise FileNotFoundError(f"config {str(path)!r}: its base {base!r} does not exist next to it")
    return bases


def _key_paths(node: ast.expr, path: KeyPath) -> list[tuple[KeyPath, int]]:
    """Key paths that an expression sets, with their line; a dict written out is looked into."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        pairs = [(k.arg, k.value) for k in node.keywords if k.arg]
    elif isinstance(node, ast.Dict):
        pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
    else:
        return [(path, node.lineno)]
    found = [(path, node.lineno)]
    for key, value in pairs:
        if key != "_delete_":
            found += _key_paths(value, (*path, str(key)))
    return found


def last_setter(layers: Sequence[Layer], path: KeyPath) -> tuple[int, str] | None:
    """Number and place of the last layer that set `path`, or a key above it to something not spelt out."""
    for number in range(len(layers) - 1, -1, -1):
        paths = layers[number].paths
        if path in paths:
            return number, paths[path]
        above = next((path[:n] for n in range(len(path) - 1, 0, -1) if path[:n] in paths), None)
        if above and not any(p[: len(above)] == above and len(p) > len(above) for p in paths):
            return number, paths[above]
    return None


def split_arguments(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Command-line words to (key, values): ``--key value``, ``--key=value``, ``key=value`` and bare ``--flag``.

    Raises:
        ValueError: a word that belongs to no key.
    """
    found: list[tuple[str, list[str]]] = []
    open_key = False
    for word in arguments:
        key, sep, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            found.append((key[2:], [value] if sep else []))
            open_key = not sep
        elif open_key:
            found[-1][1].append(word)
        elif sep and re.fullmatch(r"[A-Za-z_][\w.:-]*", key):
            found.append((key, [value]))
        else:
            raise ValueError(f"argument {word!r} belongs to no key; write --key value or --key=value")
    return found


def parse_literal(text: str) -> Any:
    """A Python literal as people type it: none, true, 1e3, (1.0, 4), {...}, dict(a=1); anything else is text."""
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(_Dicts().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError):
        return text


class _Dicts(ast.NodeTransformer):
    """``dict(a=1)``, as configs have it, becomes ``{"a": 1}``."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        named = [(ast.Constant(pair.arg), pair.value) for pair in node.keywords if pair.arg]
        if (
            not isinstance(node.func, ast.Name)
            or node.func.id != "dict"
            or len(named) < len(node.keywords) + len(node.args)
        ):
            return node
        return ast.Dict([key for key, _ in named], [value for _, value in named])


def value_from_words(key: str, words: Sequence[str], hint: Any) -> Any:
    """The value of one override, as the type of its field wants it.

    No word at all is a bare flag and means True. Several words are accepted where a shell has expanded
    ``epoch*-global_step*``: the newest checkpoint is taken.

    Raises:
        ValueError: the words do not fit.
    """
    if not words:
        try:
            return fit(True, hint, f"--{key}")
        except ValueError as problem:
            raise ValueError(f"--{key} needs a value, only switches may stand alone") from problem
    text = words[0]
    if len(words) > 1:
        if not all(CHECKPOINT_NAME.search(w) for w in words):
            raise ValueError(f"--{key} takes one value, got {len(words)}: {list(words)}; quote a value with blanks")
        text = max(words, key=lambda w: tuple(map(int, reversed(CHECKPOINT_NAME.search(w).groups()))))
    literal = parse_literal(text)
    try:
        return fit(literal, hint, f"--{key}")
    except ValueError:
        if literal is not text:
            try:
                return fit(text, hint, f"--{key}")
            except ValueError:
                pass  # the first error speaks of the value as it was meant
        raise


def set_path(
    settings: dict[str, Any], key: str, words: Sequence[str], hint_of: Callable[[KeyPath, dict], Any]
) -> KeyPath:
    """Set one override in `settings`.

    Args:
        key: dotted; ``-`` counts as ``_`` unless a key is really spelt with it.
        hint_of: (path, settings) -> type of that field; raises ValueError with the nearest names if there is none.

    Returns: the path that was set, with the spelling of the config.
    """
    section: Any = settings
    path: KeyPath = ()
    segments = key.split(".")
    for depth, segment in enumerate(segments):
        name = _spelling(section, segment)
        path = (*path, name)
        if depth == len(segments) - 1:
            break
        hint_of(path, settings)
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, Mapping):
            raise ValueError(f"--{key}: {'.'.join(map(str, path))} is {inner!r}, it has no parts to set")
        section = inner
    section[path[-1]] = value_from_words(key, words, hint_of(path, settings))
    return path


def _spelling(section: Mapping, segment: str) -> Any:
    """The key of `section` that `segment` means: as typed, with ``_`` for ``-``, or as an integer."""
    plain = segment.replace("-", "_")
    for candidate in (segment, plain):
        if candidate in section:
            return candidate
    return int(segment) if re.fullmatch(r"\d+", segment) else plain
