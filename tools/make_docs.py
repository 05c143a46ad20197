"""Write docs/configs.md from the settings and the registries: python tools/make_docs.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from opensora_like.registry import BOOSTERS, DATASETS, MODELS, SCHEDULERS, hints_of, parameters_of
from opensora_like.settings import SECTIONS, SHORTHANDS, InferenceConfig, Optim, RunConfig, settings_table
from opensora_like.settings_open_sora import SAMPLING, TRAINING

PAGE = Path(__file__).parent.parent / "docs/configs.md"

HEAD = """# Configs

<!-- Written by tools/make_docs.py; edit the docstrings, not this file. -->

A run is one Python file. Every top-level name in it is a setting of the tables below; a name that is not there is an
error that tells the nearest ones. `_base_ = ["other.py"]` (paths from the file itself) inherits: dicts merge into the
base's dict, everything else replaces it; `_delete_=True` in a dict replaces the whole dict. Two bases may not set the
same name.

On the command line, after the config: `--optim.lr 1e-5`, `--optim.lr=1e-5`, `optim.lr=1e-5`, and bare `--wandb` for
True; `-` in a key counts as `_`. Values are Python literals: `none`, `1e3`, `"(1.0, 4)"`, `"[1, 2]"`, `"dict(a=1)"`.
One that does not fit the type of its setting is refused. `--dump` prints the resolved config, `--explain optim.lr` says
which file and line, or which flag, set a value. The resolved config is written into the run's folder and can be given
as a config itself.
"""

FROM_OPEN_SORA = """## Settings of Open-Sora v2

What is not in these tables has the same name here, or one of the shorthands above. A flag or a file with one of these
names is an error that says what stands here. Sampling takes some of them as they are ([inference.md](inference.md)).
Of the same name and another meaning are `grad_ckpt_buffer_size`, which counts bytes in place of elements, and
`warmup_steps`, which counts updates in place of micro-batches.
"""


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def component(name: str, cls: type, given: tuple[str, ...]) -> str:
    """One registered class: what it is, and its arguments."""
    doc = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    hints, rows = hints_of(cls), []
    for key, parameter in parameters_of(cls).items():
        if key in given:
            continue
        hint = hints.get(key, "")
        kind = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
        default = "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        rows.append((f"`{key}`", kind.replace("typing.", ""), default))
    return f"### `{name}`\n\n{doc}\n\n" + table(rows, ("argument", "type", "default"))


def configs_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, schema in (("Training", RunConfig), ("Inference", InferenceConfig)):
        rows = [(f"`{n}`", kind, f"`{default}`", doc) for n, kind, default, doc in settings_table(schema)]
        parts.append(f"## {title}: every setting\n\n" + table(rows, ("setting", "type", "default", "meaning")))
    rows = [(f"`{short}`", f"`{'.'.join(path)}`") for short, path in SHORTHANDS.items()]
    parts.append(
        "## Shorthands\n\nA top-level name that sets a field; of the two, whichever was written last counts.\n\n"
        + table(rows, ("name", "sets"))
    )
    parts.append(FROM_OPEN_SORA)
    for title, names in (("training", TRAINING), ("inference", SAMPLING)):
        rows = [(f"`{name}`", what) for name, what in sorted(names.items())]
        parts.append(f"### In configs and commands for {title}\n\n" + table(rows, ("there", "here")))
    parts.append("## `optim`\n\n" + component("optim", Optim, ("type",)).split("\n\n", 1)[1])
    given = {section.registry.name: section.given for section in SECTIONS.values()}
    for registry in (MODELS, DATASETS, SCHEDULERS, BOOSTERS):
        registry.import_from_location()
        parts.append(f"## {registry.name.upper()}S: `type` and its arguments")
        own = {n: c for n, c in registry.module_dict.items() if c.__module__.startswith("opensora_like.")}
        for name, cls in sorted(own.items()):
            parts.append(component(name, cls, given.get(registry.name, ())))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(configs_page())
    print(f"wrote {PAGE.name}")
