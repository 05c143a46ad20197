"""The user's DeepSpeed JSON, checked against what the program decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora_like.registry import nearest

WHERE = "booster.config"
# What a user may leave to DeepSpeed. It ignores names that it does not know; here they are errors.
SECTIONS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "optimizer",
    "data_types",
    "communication_data_type",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "dump_state",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "log_level",
    "timers",
    "disable_python_gc",
)
# path -> the only value that keeps what this program promises, and why
FIXED: dict[str, tuple[Any, str]] = {
    "zero_allow_untested_optimizer": (True, "the optimizer is made from `optim`"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is made from `optim`"),
    "bf16.check_grad_overflow": (True, "a step that is not finite must change nothing"),
    "bf16.bf16_master_weights_and_grads": (False, "checkpoints and the EMA need float32 masters"),
    "zero_optimization.compute_grad_norm": (True, "the norm is logged, and clipping needs it"),
    "zero_optimization.zero_quantized_weights": (False, "it is not tested here"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "it is not tested here"),
    "zero_optimization.zero_quantized_gradients": (False, "it is not tested here"),
    "zero_optimization.zero_hpz_partition_size": (1, "it is not tested here"),
    "zero_optimization.zenflow": (None, "it updates weights in steps of its own"),
}
OF_BUCKETS = ("train_batch_size", "train_micro_batch_size_per_gpu")


@dataclass(frozen=True)
class Decided:
    """What the program and the booster's own arguments say; None is left to the JSON.

    Args:
        stage: of ZeRO.
        cpu_offload: whether masters and optimizer state are in host memory.
    """

    stage: int | None
    cpu_offload: bool | None
    dtype: str
    grad_clip: float
    accumulation_steps: int | None


def read_config(config: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A JSON file, or what it would contain, as a dict of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or a name twice.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return _plain(config)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"{WHERE}={config!r}: there is no such file")
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_without_repetition)
    except ValueError as problem:
        raise ValueError(f"{WHERE}={config!r} cannot be read: {problem}; mend the file") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{WHERE}={config!r} holds a {type(content).__name__}; write an object, {{...}}")
    return content


def complete_config(config: Mapping[str, Any], decided: Decided) -> dict[str, Any]:
    """What DeepSpeed is given: the user's settings, "auto" replaced, and those that the program decides.

    The loop divides the loss and says when to update, so DeepSpeed counts no micro-batches; the numbers 1 that it is
    given are for its bookkeeping. Its own way to accumulate loses, under offload, the gradient of a weight that the
    last micro-batch does not use.

    Raises:
        ValueError: a name that is unknown here, or a value that contradicts the program.
    """
    for key in config:
        if key == "scheduler":
            raise ValueError(f"{WHERE}.scheduler: the program sets the learning rate; use lr_schedule and warmup_steps")
        if key not in SECTIONS:
            raise ValueError(f"{WHERE}.{key}: not an option of this booster; {nearest(str(key), SECTIONS)}")
    done = copy.deepcopy(dict(config))
    _check_names(done)
    for key in OF_BUCKETS:
        if (value := done.pop(key, "auto")) != "auto":
            raise ValueError(f"{WHERE}.{key}={value!r}: bucket_config decides batch sizes, and they vary; write 'auto'")
    _settle(done, "zero_optimization.stage", decided.stage, f"booster.stage={decided.stage!r}", default=2)
    _settle(done, "gradient_clipping", float(decided.grad_clip), f"grad_clip={decided.grad_clip!r}")
    _settle(done, "bf16.enabled", decided.dtype == "bf16", f"dtype={decided.dtype!r}")
    _settle(done, "fp16.enabled", False, f"dtype={decided.dtype!r}")
    _settle_accumulation(done, decided.accumulation_steps)
    _settle_offload(done, decided.cpu_offload)
    for path, (value, reason) in FIXED.items():
        _fix(done, path, value, reason)
    done["zero_allow_untested_optimizer"], done["zero_force_ds_cpu_optimizer"] = True, False
    done["train_micro_batch_size_per_gpu"] = done["gradient_accumulation_steps"] = 1
    done["managed_gradient_accumulation"] = False
    done.setdefault("timers", {"throughput": {"enabled": False}})  # it would synchronise the device at every step
    done = _without_auto(done)
    _check_stage_1(done)
    _check_below_stage_3(done)
    return done


def check_optimizer(section: Any, optimizer: torch.optim.Optimizer) -> None:
    """Compare the JSON's ``optimizer`` with the one made from `optim`.

    Raises:
        ValueError: another optimizer, or another value.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"{WHERE}.optimizer={section!r} must be an object; remove it, `optim` decides")
    made, asked = type(optimizer).__name__, section.get("type", "auto")
    if asked != "auto" and str(asked).lower() != made.lower():
        raise ValueError(f"{WHERE}.optimizer.type={asked!r} contradicts optim.type={made!r}; remove the section")
    if others := sorted(section.keys() - {"type", "params"}):
        raise ValueError(f"{WHERE}.optimizer.{others[0]}: has no effect, the optimizer is made from `optim`; remove it")
    for name, value in section.get("params", {}).items():
        if name not in optimizer.defaults:
            raise ValueError(f"{WHERE}.optimizer.params.{name}: {made} has none; {nearest(name, optimizer.defaults)}")
        own = optimizer.defaults[name]
        if value != "auto" and (list(value) != list(own) if isinstance(own, (tuple, list)) else value != own):
            raise ValueError(
                f"{WHERE}.optimizer.params.{name}={value!r} contradicts optim.{name}={own!r}; write 'auto' there"
            )


def _check_names(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {
        "zero_optimization": [field.alias or name for name, field in fields.items()] + list(fields),
        "data_types": ["grad_accum_dtype"],
    }
    for section, names in known.items():
        given = config.get(section, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"{WHERE}.{section}={given!r} must be an object, {{...}}")
        for key in given:
            if key not in names:
                raise ValueError(f"{WHERE}.{section}.{key}: there is no such option; {nearest(str(key), set(names))}")


def _settle(config: dict[str, Any], path: str, value: Any, said: str, *, default: Any = None) -> None:
    """Make the entry at `path` equal to `value`, as the setting `said` asks; None takes what is there, or `default`."""
    section, key = _section(config, path)
    given = section.get(key, "auto")
    if given == "auto":
        section[key] = default if value is None else value
    elif value is not None and given != value:
        raise ValueError(f"{WHERE}.{path}={given!r} contradicts {said}; write 'auto' there, or change one of them")


def _settle_accumulation(config: dict[str, Any], steps: int | None) -> None:
    given = config.get("gradient_accumulation_steps", "auto")
    if given != "auto" and given != steps:
        raise ValueError(
            f"{WHERE}.gradient_accumulation_steps={given!r} contradicts accumulation_steps={steps!r}; "
            "write 'auto' there, or change one of them"
        )


def _settle_offload(config: dict[str, Any], cpu_offload: bool | None) -> None:
    """Where the optimizer is, and the parameters; a disk is refused, because checkpoints need views in memory."""
    zero = config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "nvme":
            raise ValueError(f"{WHERE}.zero_optimization.{name}.device='nvme': not supported; use 'cpu'")
    if cpu_offload is not None:
        if zero.get("offload_optimizer") in (None, "auto"):
            zero["offload_optimizer"] = {}
        device, said = ("none", "cpu")[cpu_offload], f"booster.cpu_offload={cpu_offload!r}"
        _settle(config, "zero_optimization.offload_optimizer.device", device, said)


def _fix(config: dict[str, Any], path: str, value: Any, reason: str) -> None:
    section, key = _section(config, path)
    if section.get(key, "auto") not in ("auto", value):
        raise ValueError(f"{WHERE}.{path}={section[key]!r} is not supported ({reason}); write {value!r} or remove it")


def _section(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise ValueError(f"{WHERE}.{path.rpartition('.')[0]}={config!r} must be an object, {{...}}")
    return config, key


def _check_stage_1(config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    if zero["stage"] != 1:
        return
    if zero.get("overlap_comm"):
        raise ValueError(f"{WHERE}.zero_optimization.overlap_comm=True needs stage 2 or 3, not 1; remove it")
    on_device = (zero.get("offload_optimizer") or {}).get("device", "none") == "none"
    if config.get("data_types", {}).get("grad_accum_dtype") == "fp32" and config["bf16"]["enabled"] and on_device:
        raise ValueError(
            f"{WHERE}.data_types.grad_accum_dtype='fp32' makes stage 1 another, untested optimizer; use stage 2"
        )


def _check_below_stage_3(config: Mapping[str, Any]) -> None:
    """DeepSpeed does not look at where weights are to be kept where it shards none.

    Numbers that tune stage 3 may stay, as one file serves several stages; nothing is expected of them.
    """
    zero = config["zero_optimization"]
    device = (zero.get("offload_param") or {}).get("device", "none")
    if zero["stage"] < 3 and device != "none":
        raise ValueError(
            f"{WHERE}.zero_optimization.offload_param.device={device!r} has no effect at stage {zero['stage']}, where "
            "each rank has all weights on its device; remove it, or use stage 3"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Any other "auto" means DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]!r} stands there twice")
    return dict(pairs)
