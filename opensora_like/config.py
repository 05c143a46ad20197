"""Reads a config: files, then the command line, then every check; explains it and writes it back."""

from __future__ import annotations

import dataclasses
import importlib
import pprint
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from opensora_like.config_file import Layer, last_setter, read_layers, set_path, split_arguments
from opensora_like.registry import fit, fit_arguments, hints_of, nearest, parameters_of, resolve
from opensora_like.settings import (
    PLAIN_SECTIONS,
    SECTIONS,
    SHORTHANDS,
    SPELLINGS,
    Distill,
    InferenceConfig,
    KeyPath,
    Optim,
    RunConfig,
    Section,
)
from opensora_like.settings_open_sora import advice

Schema = TypeVar("Schema")


class FrozenDict(dict):
    """A dict that says no to changes, so that nothing edits a config while it trains."""

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a config is frozen once it is read; make a dict(...) of this section and change the copy")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)


@dataclass(frozen=True)
class Explained:
    """A config and where its values come from."""

    config: Any
    layers: list[Layer]

    def explain(self, key: str) -> str:
        """One line that says what `key` is and which file or flag set it.

        Raises:
            ValueError: there is no such key.
        """
        path = _in_full(tuple(key.removeprefix("--").replace("-", "_").split(".")), type(self.config))
        value: Any = dataclasses.asdict(self.config)
        for depth, name in enumerate(path):
            known = {str(k): k for k in value} if isinstance(value, Mapping) else {}
            if name not in known:
                above = ".".join(path[:depth]) or type(self.config).__name__
                raise ValueError(f"--explain {key}: {above} has no {name!r}; {nearest(name, known)}")
            value = value[known[name]]
        shorts = [((short,), to) for short, to in SHORTHANDS.items()] + list(SPELLINGS.items())
        spellings = [path, *((*short, *path[len(to) :]) for short, to in shorts if path[: len(to)] == to)]
        setters = [s for s in (last_setter(self.layers, p) for p in spellings) if s]
        source = max(setters)[1] if setters else f"default of {type(self.config).__name__}"
        return f"{'.'.join(path)} = {value!r}  ({source})"


def read_config(path: str | Path, arguments: Sequence[str] = (), *, schema: type[Schema] = RunConfig) -> Explained:
    """Read a config file and the command line over it; check every key, name and type.

    Args:
        arguments: ``--a.b value``, ``--a.b=value``, ``a.b=value`` and bare ``--flag``.
        schema: `RunConfig` or `InferenceConfig`.

    Raises:
        FileNotFoundError: the file or a base of it.
        ValueError: anything unknown, misspelt or of another type; the message has the nearest names.
    """
    settings, layers = read_layers(Path(path))
    _import_custom(settings.get("custom_imports"))
    replacing = {n for n, v in settings.items() if n in SHORTHANDS and isinstance(v, Mapping) and v.get("_delete_")}
    settings = _over_defaults(_plain(settings), schema)
    _apply_shorthands(settings, layers, schema, replacing=replacing)  # before flags, which may reach into them
    flags: dict[KeyPath, str] = {}
    for key, words in split_arguments(arguments):
        typed = tuple(key.split("."))
        full = _in_full(typed, schema) if len(typed) > 1 else typed
        if (top := full[0].replace("-", "_")) not in _known_names(schema):
            raise ValueError(f"--{top}: no such setting; {_meant(full, schema)}")
        set_to = set_path(settings, ".".join(full), words, lambda p, s: _hint_of(p, s, schema))
        flags[tuple(map(str, set_to))] = f"--{key} {' '.join(words)}".strip()
    layers = [*layers, Layer("command line", flags)]
    _apply_shorthands(settings, layers, schema, replacing=SHORTHANDS)
    _check_keys(settings, schema, path)
    values = _fit_fields(settings, schema)
    _check_sections(values)
    config = schema(**{k: _freeze(v) for k, v in values.items()})
    return Explained(config, layers)


def _in_full(path: KeyPath, schema: type) -> KeyPath:
    """`path` with the field of `schema` that a shorthand at its start stands for."""
    path = SPELLINGS.get(path, path)
    full = SHORTHANDS.get(path[0].replace("-", "_"), path[:1])
    return (*full, *path[1:]) if full[0] in hints_of(schema) else path


def _over_defaults(settings: dict[str, Any], schema: type) -> dict[str, Any]:
    """`settings` with the sections that they do not mention, so that an override can reach into these.

    A section without a ``type`` changes the default one; with a ``type`` it stands for itself.
    """
    for spec in dataclasses.fields(schema):
        if spec.default_factory is not MISSING:
            default, given = spec.default_factory(), settings.get(spec.name)
            if given is None:
                settings[spec.name] = default
            elif isinstance(default, dict) and isinstance(given, dict) and "type" not in given:
                settings[spec.name] = {**default, **given}
    return settings


def _import_custom(custom: Any) -> None:
    """Import user modules before names are looked up; also mmengine's ``dict(imports=[...])``."""
    modules = custom.get("imports", []) if isinstance(custom, Mapping) else custom or []
    for name in [modules] if isinstance(modules, str) else modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as problem:
            if problem.name != name.split(".")[0] and problem.name != name:
                raise  # the module exists, something that it needs does not
            raise ValueError(
                f"custom_imports: there is no module {name!r}; run from its folder, or put that on PYTHONPATH"
            ) from problem


def _plain(value: Any) -> Any:
    """A deep copy in plain dicts, without merge marks."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k != "_delete_"}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({k: _freeze(v) for k, v in value.items()})
    return value


def _hint_of(path: KeyPath, settings: Mapping, schema: type) -> Any:
    """Type of the field at `path`; ValueError with the nearest names if there is none."""
    top = path[0]
    fields = hints_of(schema)
    if len(path) == 1:
        if top in SHORTHANDS:
            return Any if SHORTHANDS[top][0] != "optim" else hints_of(Optim)[SHORTHANDS[top][1]]
        return fields[top]
    depth, cls = _section_class(path, settings)
    if cls is None or len(path) > depth + 1:
        if top == "bucket_config" and len(path) == 3:
            return tuple
        return float if top in ("condition_config", "dropout_ratio") else Any
    known = parameters_of(cls)
    if path[depth] == "type":
        return str
    if path[depth] not in known:
        named = known if top in PLAIN_SECTIONS else {*known, "type"}
        where = ".".join(map(str, path[:depth]))
        near = _published(path, schema) or nearest(str(path[depth]), named)
        raise ValueError(f"--{where}.{path[depth]}: no such argument of it; {near}")
    return hints_of(cls).get(path[depth], Any)


def _section_class(path: KeyPath, settings: Mapping) -> tuple[int, Any]:
    """How deep the section is that `path` goes into, and the class that its arguments belong to (or None)."""
    depth = 2 if path[0] == "encoders" else 1
    known = SECTIONS.get("encoders.*" if depth == 2 else path[0])
    section: Any = settings
    for name in path[:depth]:
        section = section.get(name, {}) if isinstance(section, Mapping) else {}
    if path[0] in PLAIN_SECTIONS:
        return depth, PLAIN_SECTIONS[path[0]]
    if known is None or len(path) <= depth or not isinstance(section, Mapping) or "type" not in section:
        return depth, None
    return depth, resolve(section["type"], known.registry, where=".".join(map(str, path[:depth])))


def _apply_shorthands(settings: dict, layers: Sequence[Layer], schema: type, *, replacing: Container[str]) -> None:
    """Move shorthands and second spellings to the field they stand for; the later of the two wins.

    Args:
        replacing: those whose dict stands for itself; another one is merged, as dicts of files are.
    """
    for short, target in [*(((name,), to) for name, to in SHORTHANDS.items()), *SPELLINGS.items()]:
        named, (section, leaf) = ".".join(short), target
        holder = settings if len(short) == 1 else settings.get(short[0])
        if not isinstance(holder, dict) or short[-1] not in holder:
            continue
        value = holder.pop(short[-1])
        if section not in hints_of(schema):
            why = _published(short, schema) or f"{schema.__name__} has no {section!r} that it could set"
            raise ValueError(f"{named}={value!r}: {why}")
        place = settings.get(section)
        if not isinstance(place, dict):
            raise ValueError(f"{named}={value!r} sets {'.'.join(target)}, but {section}={place!r} is not a dict")
        own, other = last_setter(layers, short), last_setter(layers, target)
        number, where = own or (len(layers), "")
        other_number, other_where = other or (-1, "")
        held = place.get(leaf)
        merges = named not in replacing and isinstance(value, dict) and isinstance(held, dict)
        differs = any(held.get(k, v) != v for k, v in value.items()) if merges else held != value
        if leaf in place and number == other_number and differs:
            raise ValueError(
                f"{where} sets {named}={value!r}, {other_where} sets {'.'.join(target)}={held!r}; keep one"
            )
        is_newer = leaf not in place or number >= other_number
        if merges:
            place[leaf] = {**held, **value} if is_newer else {**value, **held}
        elif is_newer:
            place[leaf] = value


def _other(schema: type) -> type:
    return InferenceConfig if schema is RunConfig else RunConfig


def _known_names(schema: type) -> set[str]:
    """Top-level names that a file or a flag may set."""
    fields = {f.name for f in dataclasses.fields(schema)}
    return fields | {short for short, (section, _) in SHORTHANDS.items() if section in fields}


def _meant(path: KeyPath, schema: type) -> str:
    """The tail of an error about a setting that is not there: what it is called here, or the nearest names."""
    name, known = str(path[0]).replace("-", "_"), _known_names(schema)
    near = nearest(name, known) if get_close_matches(name, known) else "docs/configs.md has all of them"
    return _published(path, schema) or near


def _published(path: KeyPath, schema: type) -> str | None:
    return advice(".".join(map(str, path)).replace("-", "_"), is_training=schema is RunConfig)


def _default(schema: type, name: str) -> Any:
    spec = next(f for f in dataclasses.fields(schema) if f.name == name)
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _check_keys(settings: Mapping, schema: type, path: str | Path) -> None:
    fields = {f.name: f for f in dataclasses.fields(schema)}
    trains = "bucket_config" in settings
    for name in settings:
        if name not in fields and trains != (schema is RunConfig) and name in hints_of(_other(schema)):
            kind, folder = ("training", "inference") if trains else ("sampling", "train")
            raise ValueError(f"{path} is for {kind} (it sets {name!r}); take one of configs/diffusion/{folder}")
        if name not in fields:
            raise ValueError(f"{path}: unknown setting {name!r}; {_meant((name,), schema)}")
    missing = [n for n, f in fields.items() if n not in settings and f.default is f.default_factory is MISSING]
    if missing:
        raise ValueError(f"{path}: {missing} not set; inherit them with _base_ or write them down")


def _fit_fields(settings: Mapping, schema: type) -> dict[str, Any]:
    hints = hints_of(schema)
    values = {f.name: _default(schema, f.name) for f in dataclasses.fields(schema)}
    values.update(settings)
    if isinstance(values.get("custom_imports"), Mapping):
        values["custom_imports"] = list(values["custom_imports"].get("imports", []))
    if isinstance(values.get("bucket_config"), Mapping):
        values["bucket_config"] = {
            r: {_as_int(k): v for k, v in t.items()} if isinstance(t, Mapping) else t
            for r, t in values["bucket_config"].items()
        }
    return {name: fit(value, hints[name], name) for name, value in values.items()}


def _as_int(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _check_sections(values: dict[str, Any]) -> None:
    """Check the arguments of every section that names a class; convert them where the class asks for it."""
    if "optim" in values:
        section = {"type": "AdamW", **values["optim"]}
        for name in section:
            if said := _published(("optim", name), RunConfig):
                raise ValueError(f"optim.{name}: {said}")
        checked = fit_arguments(Optim, section, where="optim")
        checked["type"] = fit(section["type"], hints_of(Optim)["type"], "optim.type")
        values["optim"] = dataclasses.asdict(Optim(**checked))
    if values.get("distill") is not None:
        if "type" in values["distill"]:
            raise ValueError(f"distill.type={values['distill']['type']!r}: there is one kind only; remove it")
        checked = fit_arguments(Distill, {"type": "distill", **values["distill"]}, where="distill")
        values["distill"] = dataclasses.asdict(Distill(**checked))
    for name, known in SECTIONS.items():
        top = name.split(".")[0]
        if values.get(top) is None:
            continue
        sections = {f"{top}.{k}": v for k, v in values[top].items()} if "*" in name else {top: values[top]}
        for where, section in sections.items():
            checked = _check_section(section, known, where)
            if "*" in name:
                values[top][where.split(".", 1)[1]] = checked
            else:
                values[top] = checked


def _check_section(section: Any, known: Section, where: str) -> dict[str, Any]:
    if not isinstance(section, Mapping) or "type" not in section:
        raise ValueError(f"{where}={section!r} needs a 'type', one of the names in {known.registry.name.upper()}S")
    cls = resolve(section["type"], known.registry, where=where)
    if missing := [method for method in known.methods if not hasattr(cls, method)]:
        fitting = [n for n, c in known.registry.module_dict.items() if all(hasattr(c, m) for m in known.methods)]
        raise ValueError(
            f"{where}.type={section['type']!r} has no {missing[0]!r} and cannot be the {where}; use one of "
            f"{sorted(fitting)}"
        )
    takes = {n: None for n in known.given if n in parameters_of(cls)}
    return {"type": section["type"], **fit_arguments(cls, section, where=where, given=takes)}


def to_dict(config: Any) -> dict[str, Any]:
    """The settings in plain dicts, as they would be written in a file."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def config_text(config: Any) -> str:
    """The resolved config as a file that can be read back."""
    lines = [f'"""Resolved {type(config).__name__}: every setting of a run. It can be given as a config itself."""\n']
    for name, value in to_dict(config).items():
        lines.append(f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}")
    return "\n".join(lines) + "\n"
