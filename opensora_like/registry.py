"""The four registries, and how a config section becomes an object."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.registry import Registry

PACKAGE = "opensora_like"


def _modules_below(folder: str) -> list[str]:
    """Import names of every module below `folder` of this package, found by listing files."""
    root = Path(__file__).parent
    files = sorted((root / folder).rglob("*.py"))
    names = [f.relative_to(root).with_suffix("").parts for f in files]
    return [".".join((PACKAGE, *(part for part in parts if part != "__init__"))) for parts in names]


MODELS = Registry("model", scope=PACKAGE, locations=_modules_below("models"))
DATASETS = Registry("dataset", scope=PACKAGE, locations=_modules_below("datasets"))
SCHEDULERS = Registry("scheduler", scope=PACKAGE, locations=_modules_below("schedulers"))
BOOSTERS = Registry("booster", scope=PACKAGE, locations=_modules_below("boosters"))


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known names, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3)
    return f"did you mean {near}?" if near else f"there are {known}"


def resolve(name: Any, registry: Registry, *, where: str = "") -> Any:
    """The class or function registered as `name`.

    Args:
        where: the config section, for the error.

    Raises:
        ValueError: nothing has this name.
    """
    at = f"{where}.type={name!r}: " if where else ""
    registry.import_from_location()
    known = registry.module_dict
    if name not in known:
        raise ValueError(f"{at}unknown {registry.name} {name!r}; {nearest(str(name), known)}")
    return known[name]


def build(cfg: Mapping[str, Any], registry: Registry, *, where: str = "", **runtime: Any) -> Any:
    """Build ``cfg["type"]`` from `registry`.

    Args:
        cfg: the section as written in the config file; it is not modified.
        where: the section's name in the config, for errors.
        **runtime: objects a config cannot hold (a device, a seed). A class takes those it has an argument
            for; the config may not set them.

    Raises:
        ValueError: no ``type``, an unknown ``type``, an argument that is unknown, missing or of
            another type, or a name given both ways.
    """
    cls = resolve(_type_of(cfg, registry, where), registry, where=where)
    given = {name: value for name, value in runtime.items() if name in parameters_of(cls)}
    return cls(**fit_arguments(cls, cfg, where=where or registry.name, given=given), **given)


def _type_of(cfg: Mapping[str, Any], registry: Registry, where: str) -> Any:
    if not isinstance(cfg, Mapping):
        raise ValueError(f"{where or registry.name}={cfg!r} is not a dict with a 'type'; write dict(type=..., ...)")
    if "type" not in cfg:
        raise ValueError(f"{where or registry.name} has no 'type'; got keys {sorted(map(str, cfg))}")
    return cfg["type"]


def parameters_of(cls: Any) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a registered class or function, by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(cls).parameters.items() if p.kind in kinds}


def hints_of(cls: Any) -> dict[str, Any]:
    """Type hints of the parameters; a hint that cannot be evaluated counts as none."""
    try:
        return typing.get_type_hints(cls.__init__ if isinstance(cls, type) else cls)
    except NameError:  # a name imported under TYPE_CHECKING only
        return {}


def fit_arguments(
    cls: Any, cfg: Mapping[str, Any], *, where: str, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check a section against the signature of what it names.

    Args:
        given: arguments that the caller supplies at build time.

    Returns: the arguments without ``type``, converted where the type asks for it (1 -> 1.0, list -> tuple).
    """
    given = given or {}
    known, hints = parameters_of(cls), hints_of(cls)
    arguments = {}
    for key, value in cfg.items():
        if key == "type":
            continue
        if key in given:
            raise ValueError(f"{where}.{key}: set by the program, remove it from the config")
        if key not in known:
            raise ValueError(f"{where}.{key}: {cfg['type']!r} has no such argument; {nearest(str(key), known)}")
        arguments[key] = fit(value, hints.get(key, Any), f"{where}.{key}")
    empty = inspect.Parameter.empty
    missing = [n for n, p in known.items() if p.default is empty and n not in arguments and n not in given]
    if missing:
        raise ValueError(f"{where}: {cfg['type']!r} needs {missing}; add them to the config")
    return arguments


def fit(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` wants it, or an error that names the place.

    Only lossless conversions are made: 3 -> 3.0, 1e3 -> 1000, list -> tuple and back.

    Raises:
        ValueError: `value` does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, (str, typing.TypeVar)):
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, args, hint, where)
    if origin is typing.Annotated:
        return fit(value, args[0], where)
    if origin is typing.Literal:
        if value in args:
            return value
        near = get_close_matches(str(value), map(str, args))
        raise ValueError(f"{where}={value!r} is not one of {list(args)}" + (f"; did you mean {near}?" if near else ""))
    plain = origin or hint
    if plain in _SIMPLE:
        return _fit_simple(value, plain, where)
    if plain in (list, tuple) or (isinstance(plain, type) and plain.__name__ == "Sequence"):
        return _fit_sequence(value, plain, args, where)
    if isinstance(plain, type) and issubclass(plain, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r} must be a dict, not {type(value).__name__}")
        inner = args[1] if len(args) == 2 else Any
        return {k: fit(v, inner, f"{where}.{k}") for k, v in value.items()}
    return value


_SIMPLE = (int, float, bool, str, type(None))


def _fit_union(value: Any, options: tuple, hint: Any, where: str) -> Any:
    if any(type(value) is (typing.get_origin(o) or o) for o in options if o in _SIMPLE):
        return value
    problems = []
    for option in options:
        try:
            return fit(value, option, where)
        except ValueError as problem:
            problems.append(problem)
    real = [p for o, p in zip(options, problems, strict=True) if o is not type(None)]
    if len(real) == 1:
        raise real[0]
    raise ValueError(f"{where}={value!r} does not fit {_readable(hint)}")


def _fit_simple(value: Any, plain: type, where: str) -> Any:
    if plain is type(None):
        fits = value is None
    elif plain is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif plain is int:
        whole = isinstance(value, float) and value.is_integer()
        fits = whole or (isinstance(value, int) and not isinstance(value, bool))
    else:
        fits = isinstance(value, plain)
    if not fits:
        raise ValueError(f"{where}={value!r} must be {_readable(plain)}, not {type(value).__name__}")
    return value if plain in (type(None), str, bool) else plain(value)


def _fit_sequence(value: Any, plain: type, args: tuple, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}={value!r} must be a list, not {type(value).__name__}")
    if plain is tuple and args and args[-1] is not Ellipsis and len(args) != len(value):
        raise ValueError(f"{where}={value!r} has {len(value)} entries, {len(args)} are needed")
    if not args:
        inner = [Any] * len(value)
    elif plain is tuple and args[-1] is not Ellipsis:
        inner = list(args)
    else:
        inner = [args[0]] * len(value)
    fitted = [fit(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True))]
    return tuple(fitted) if plain is tuple else fitted


def _readable(hint: Any) -> str:
    name = None if typing.get_args(hint) else getattr(hint, "__name__", None)  # a union's own name says nothing
    return name or str(hint).replace("typing.", "")
