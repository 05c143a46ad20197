"""A NeMo DFM or Automodel YAML of Wan as a config of ours, with a list of all that could not be carried over."""

from __future__ import annotations

import pprint
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_like.training.batch_size import accumulation_of
from opensora_like.training.import_keys import READ, REASONS, RENAMED

BUCKET = re.compile(r"(\d+x\d+)x(\d+)")
STYLES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "inverse-square-root": "inverse_sqrt"}
SAMPLINGS = {"uniform", "logit_normal", "lognorm", "mix", "mode", "beta"}
# name of a published repository -> model.variant
VARIANTS = (("t2v-a14b", "t2v-A14B"), ("t2v-14b", "t2v-14B"), ("t2v-1.3b", "t2v-1.3B"))
WORDS = {"none": None, "null": None, "true": True, "false": False}
CACHE = "./processed_meta"
BF16 = ("bf16", "bfloat16", "torch.bfloat16")
FP32 = ("fp32", "float32", "torch.float32")


@dataclass
class Imported:
    """A config in plain dicts, and what to know about it.

    Args:
        settings: top-level names of a config.
        carried: (their key, our setting).
        lost: (their key, why it has no counterpart).
        notes: values that were changed or guessed.
    """

    settings: dict[str, Any]
    carried: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set a setting by its dotted path."""
        *parents, leaf = path.split(".")
        section = self.settings
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value

    def leave_out(self, theirs: str, why: str) -> None:
        """Take back what one of their keys has set, if it was there."""
        pair = (theirs, RENAMED[theirs])
        if pair in self.carried:
            self.carried.remove(pair)
            self.lost.append((theirs, why))
            *parents, leaf = RENAMED[theirs].split(".")
            section = self.settings
            for name in parents:
                section = section.get(name, {})
            section.pop(leaf, None)

    def lines(self) -> list[str]:
        """For the terminal: every key, once."""
        return [
            *(f"carried  {theirs} -> {ours}" for theirs, ours in self.carried),
            *(f"left out {theirs}: {why}" for theirs, why in self.lost),
            *(f"note     {note}" for note in self.notes),
        ]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML, dotted, with their values read as NeMo reads them ("5e-6" is a number, "none" is None).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a YAML of sections.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as problem:
        raise ValueError(f"{str(path)!r} is not readable as YAML: {problem}") from problem
    if not isinstance(tree, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(tree).__name__}, sections of settings are needed")
    return dict(_flat(tree, ""))


def _flat(tree: Mapping, above: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, _cast(value)


def _cast(value: Any) -> Any:
    if isinstance(value, list):
        return [_cast(v) for v in value]
    if not isinstance(value, str):
        return value
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        return float(value) if re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value
    except ValueError:
        return value


def import_config(keys: Mapping[str, Any], *, bucket: str = "480x832x81") -> Imported:
    """A config of ours for `keys`.

    Args:
        keys: as `read_yaml` returns them.
        bucket: height x width x frames of the clips; a YAML does not say what its cache holds.

    Raises:
        ValueError: no model, another model than Wan, or settings that contradict each other.
    """
    match = BUCKET.fullmatch(bucket)
    if match is None:
        raise ValueError(f"bucket={bucket!r} is not height x width x frames, such as 480x832x81")
    out = Imported({})
    sections = {key.split(".")[0] for key in keys}
    if {"fsdp", "ddp"} <= sections:
        raise ValueError("fsdp and ddp are both there, and only one can run; remove one section")
    _models(out, keys)
    out.put("dataset", {"type": "latents", "cache_path": CACHE})
    out.put("bucket_config", {match[1]: {int(match[2]): (1.0, int(keys.get("step_scheduler.local_batch_size") or 1))}})
    out.notes.append(f"bucket_config: a YAML says nothing of sizes; it is set to {bucket}, see --bucket")
    out.put("booster", {"type": "ddp" if "ddp" in sections else "fsdp2"})
    out.put("optim", {"type": "AdamW", "lr": 5e-6, "weight_decay": 0.01})
    out.put("dropout_ratio", {"text": 0.1})
    out.put("sample_posterior", False)
    for key, value in keys.items():
        _take(out, key, value)
    _precision(out, keys)
    _times(out, keys)
    _rates(out, keys, has_section="lr_scheduler" in sections)
    _batches(out, keys)
    _rest(out, keys, has_wandb="wandb" in sections)
    return out


def _take(out: Imported, key: str, value: Any) -> None:
    if key in READ:
        return
    if isinstance(value, str) and value.startswith("${"):
        out.lost.append((key, f"{value} is filled in from the environment; write the value"))
    elif key in RENAMED:
        if value is not None:
            out.put(RENAMED[key], value)
        out.carried.append((key, RENAMED[key]))
    else:
        out.lost.append((key, reason_for(key)))


def reason_for(key: str) -> str:
    """Why `key` has no counterpart."""
    prefixes = (p for p in REASONS if p.endswith("*") and key.startswith(p[:-1]))
    return REASONS.get(key) or REASONS.get(next(prefixes, ""), "this program knows no such key")


def _models(out: Imported, keys: Mapping[str, Any]) -> None:
    source = keys.get("model.pretrained_model_name_or_path")
    if not source:
        raise ValueError("model.pretrained_model_name_or_path is not set; it says which Wan is trained")
    kind = keys.get("model.model_type", "wan")
    if not str(kind).startswith("wan") or "wan" not in str(source).lower():
        raise ValueError(f"model {source!r} of model_type={kind!r}: only Wan is imported")
    part = "transformer_2" if keys.get("model.stage") == "low_noise" else "transformer"
    folder = str(source)
    if Path(folder).is_dir():
        sizes = {"config": f"{folder}/{part}"}
    else:
        variant = next((ours for name, ours in VARIANTS if name in folder.lower()), None)
        if variant is None:
            raise ValueError(f"model {source!r} is no folder, and no published Wan of {[v for v, _ in VARIANTS]}")
        sizes, repository = {"variant": variant}, folder
        folder = f"./ckpts/{repository.split('/')[-1]}"
        out.notes.append(f"weights are read from a folder: hf download {repository} --local-dir {folder[2:]}")
    weights = {} if keys.get("model.mode") == "pretrain" else {"from_pretrained": f"{folder}/{part}"}
    recomputes = not any(key.startswith("ddp.") for key in keys)  # its default there, but for DDP
    out.put("model", {"type": "wan", **sizes, **weights, "grad_checkpoint": recomputes})
    out.put("autoencoder", {"type": "wan_vae", "from_pretrained": f"{folder}/vae"})
    out.put("encoders", {"text": {"type": "umt5", "from_pretrained": folder, "max_length": 512}})
    for key in ("pretrained_model_name_or_path", "mode", "stage"):
        if f"model.{key}" in keys:
            out.carried.append((f"model.{key}", "model"))


def _precision(out: Imported, keys: Mapping[str, Any]) -> None:
    for key in ("model.compute_dtype", "model.torch_dtype"):
        if key not in keys:
            continue
        given = str(keys[key])
        if key.endswith("compute_dtype") and given in (*BF16, *FP32):
            out.put("dtype", "fp32" if given in FP32 else "bf16")
            out.carried.append((key, "dtype"))
        else:
            out.lost.append(
                (key, "weights, gradients and optimizer state are kept in float32; dtype is that of the work")
            )
    booster = out.settings["booster"]
    if "reduce_dtype" in booster:
        booster["reduce_dtype"] = "fp32" if str(booster["reduce_dtype"]) in FP32 else "bf16"


def _times(out: Imported, keys: Mapping[str, Any]) -> None:
    """The section `scheduler`; what the chosen distribution does not read goes to the list of what was left out."""
    given = {key.removeprefix("flow_matching."): v for key, v in keys.items() if key.startswith("flow_matching.")}
    read = out.settings.pop("scheduler", {})
    sampling, shift = given.get("timestep_sampling", "logit_normal"), read.pop("shift", 3.0)
    if sampling not in SAMPLINGS:
        out.notes.append(f"flow_matching.timestep_sampling={sampling!r} is unknown there, which means uniform")
        sampling = "uniform"
    if given.get("use_sigma_noise") is False:
        sampling, unshifted = "uniform", True
    else:
        unshifted = sampling == "beta"
    scheduler: dict[str, Any] = {"type": "flow_matching", "t_distribution": sampling, "sigma_min": 0.0}
    if not unshifted:
        scheduler["shift"] = shift
    if sampling not in ("uniform", "beta"):
        read.setdefault("mix_uniform_ratio", 0.1)
    only = {
        "logit_mean": ("logit_normal",),
        "logit_std": ("logit_normal",),
        "mix_uniform_ratio": ("logit_normal", "lognorm", "mix", "mode"),
        "beta_alpha": ("beta",),
        "beta_beta": ("beta",),
    }
    for name, value in read.items():
        if sampling in only.get(name, (sampling,)):
            scheduler[name] = value
        else:
            out.leave_out(f"flow_matching.{name}", f"not read with timestep_sampling={sampling!r}, here or there")
    _window(scheduler, keys)
    if given.get("use_loss_weighting", True) is not False:
        scheduler["weighting"] = given.get("loss_weighting_scheme") or "linear"
        if unshifted and scheduler["weighting"] == "linear":
            scheduler["weight_slope"] = shift
    out.settings["scheduler"] = scheduler
    names = ("timestep_sampling", "use_loss_weighting", "loss_weighting_scheme", "use_sigma_noise")
    out.carried += [(f"flow_matching.{name}", "scheduler") for name in names if name in given]
    out.carried += [(key, "scheduler.t_min, t_max") for key in ("model.boundary_ratio",) if key in keys]
    if "cfg_dropout_prob" not in given:
        out.notes.append("dropout_ratio.text=0.1 is the default of cfg_dropout_prob, which there does not reach Wan")


def _window(scheduler: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """The times of one expert of Wan 2.2, drawn from inside the window instead of clamped to its end."""
    stage, boundary = keys.get("model.stage"), keys.get("model.boundary_ratio") or 0.875
    if stage in ("high_noise", "low_noise"):
        scheduler |= {"t_min": boundary} if stage == "high_noise" else {"t_max": boundary}
        scheduler["window"] = "truncate"


def _rates(out: Imported, keys: Mapping[str, Any], *, has_section: bool) -> None:
    if not has_section:
        return
    style = keys.get("lr_scheduler.lr_decay_style", "cosine")
    schedule = "wsd" if str(style).lower() == "wsd" else STYLES.get(str(style))
    if schedule is None:
        raise ValueError(f"lr_scheduler.lr_decay_style={style!r} is not one of {[*STYLES, 'WSD']}")
    out.put("lr_schedule", schedule)
    if "lr_scheduler.lr_decay_style" in keys:
        out.carried.append(("lr_scheduler.lr_decay_style", "lr_schedule"))
    settings, lr = out.settings, out.settings["optim"]["lr"]
    if "warmup_steps" not in settings:
        settings["warmup_steps"] = 0.1
        out.notes.append("warmup_steps=0.1 is the default there, a tenth of all updates, at most 1000")
    stays = settings.get("weight_decay_schedule", "constant") == "constant"
    stays = stays or settings.get("weight_decay_end") in (None, settings["optim"]["weight_decay"])
    for is_unread, names in (
        (not settings["warmup_steps"], ("init_lr",)),
        (schedule == "constant", ("min_lr", "lr_decay_steps")),
        (schedule != "wsd", ("wsd_decay_steps", "lr_wsd_decay_style")),
        (stays, ("end_wd", "wd_incr_style", "wd_incr_steps")),
    ):
        for name in names if is_unread else ():
            out.leave_out(f"lr_scheduler.{name}", "not read with the other values of its section, here or there")
    if settings["warmup_steps"]:
        settings.setdefault("warmup_lr", 0.1 * lr)
    if schedule != "constant":
        settings.setdefault("min_lr", 0.01 * lr)


def _batches(out: Imported, keys: Mapping[str, Any]) -> None:
    """Check the sizes against the number of data-parallel ranks that the YAML speaks of."""
    ranks = keys.get("fsdp.dp_size")
    if "fsdp.dp_size" in keys:
        out.lost.append(
            ("fsdp.dp_size", f"the number of processes is that of torchrun; start {ranks} data-parallel ranks")
        )
    settings = out.settings
    settings.setdefault("global_batch_size", 8)
    settings.setdefault("local_batch_size", 1)
    if not ranks:
        return
    asked, at_once = settings["global_batch_size"], settings["local_batch_size"] * ranks
    try:
        accumulation_of(asked, settings["local_batch_size"], ranks)
    except ValueError as problem:
        settings["global_batch_size"] = max(1, round(asked / at_once)) * at_once
        out.notes.append(f"{problem}; written is global_batch_size={settings['global_batch_size']}")


def _rest(out: Imported, keys: Mapping[str, Any], *, has_wandb: bool) -> None:
    settings = out.settings
    settings["wandb"] = has_wandb and keys.get("wandb.enable", True) and keys.get("wandb.mode") != "disabled"
    out.carried += [(key, "wandb") for key in ("wandb.enable", "wandb.mode") if key in keys]
    if keys.get("wandb.mode") == "offline":
        out.notes.append("wandb.mode=offline: set WANDB_MODE=offline")
    if "checkpoint.enabled" in keys:
        out.carried.append(("checkpoint.enabled", "ckpt_every"))
        if keys["checkpoint.enabled"] is False:
            settings["ckpt_every"] = 0
            out.notes.append("checkpoint.enabled=False: the last update is still saved")
    if "fsdp.enable_compile" in keys:
        out.carried.append(("fsdp.enable_compile", "compile_blocks"))
        if keys["fsdp.enable_compile"]:
            settings["compile_blocks"] = "inductor"
    if settings.get("load") and not settings.get("exp_name"):
        settings["exp_name"] = "imported"
    if settings.get("load") == "LATEST":
        settings["load"] = "latest"
    if "load" in settings:
        out.notes.append(f"load={settings['load']!r} has to be a checkpoint of this program, or the word latest")
    if "lora_config" in settings and keys.get("peft.match_all_linear"):
        settings["lora_config"]["target_modules"] = "all-linear"
    if "peft.match_all_linear" in keys:
        out.carried.append(("peft.match_all_linear", "lora_config.target_modules"))
    if "betas" in settings["optim"]:
        settings["optim"]["betas"] = tuple(settings["optim"]["betas"])
    if "data.dataloader.meta_folder" in keys:
        out.notes.append(
            "dataset.cache_path has to be a store; of .meta files: tools/cache_latents.py --from_meta FOLDER "
            "--output_folder STORE"
        )
    if settings["dataset"]["cache_path"] == CACHE:
        out.notes.append("dataset.cache_path: no folder is named; prepare one, see docs/wan.md")


def config_source(imported: Imported, *, source: str) -> str:
    """The config as a file, its notes in the docstring.

    Args:
        source: name of the YAML.
    """
    notes = "\n".join(f"- {note}" for note in imported.notes).replace("\\", "/").replace('"', "'")
    head = (
        f'"""Wan, with the settings of {source}.\n\n'
        "torchrun --nproc_per_node 8 scripts/diffusion/train.py THIS_FILE\n"
        f'{notes}\n"""\n'
    )
    lines = [
        f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}" for name, value in imported.settings.items()
    ]
    return head + "\n" + "\n".join(lines) + "\n"
