"""Which parameters of the denoiser a run trains, and with which part of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from opensora_like.registry import nearest
from opensora_like.settings import RunConfig


def choose_trainable(cfg: RunConfig, model: nn.Module) -> None:
    """Freeze what `trainable_modules` does not name; nothing where it is None.

    Raises:
        ValueError: no pattern, one that is in no parameter's name or means all, or `lora_config` beside it.
    """
    patterns = cfg.trainable_modules
    if patterns is None:
        return
    if cfg.lora_config is not None:
        raise ValueError(
            f"trainable_modules={patterns!r} and lora_config are both set; adapters train on a frozen model: remove one"
        )
    names = [name for name, _ in model.named_parameters()]
    if not patterns:
        raise ValueError("trainable_modules=[] trains nothing; name parts of parameters' names, or leave it at None")
    if "." in patterns:  # which VideoX-Fun's recipes write for all; names at the top of a model have none
        raise ValueError("trainable_modules with '.' is meant for all parameters; leave it at None, which trains all")
    for pattern in patterns:
        _check_found(pattern, names, where="trainable_modules")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(pattern in name for pattern in patterns))


def lr_scales_of(model: nn.Module, lr_scales: Mapping[str, float]) -> list[float]:
    """What the learning rate of each trainable parameter is multiplied with, in the order of ``named_parameters``.

    Args:
        lr_scales: part of parameters' names -> factor, 0 or more; 1 where none is in the name.

    Raises:
        ValueError: a negative factor, a part that no trainable name has, or two factors for one parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern, scale in lr_scales.items():
        if scale < 0:
            raise ValueError(f"lr_scales[{pattern!r}]={scale} must be 0 or more")
        _check_found(pattern, names, where="lr_scales")
    return [_scale_of(name, lr_scales) for name in names]


def group_by_scale(
    parameters: Sequence[nn.Parameter], scales: Sequence[float]
) -> list[nn.Parameter] | list[dict[str, object]]:
    """What an optimizer is given: the parameters, or groups of one ``lr_scale`` each, those of 1 first.

    Args:
        scales: one per parameter; () is 1 for all.
    """
    if all(scale == 1 for scale in scales):
        return list(parameters)
    assert len(scales) == len(parameters), "the booster optimizes other parameters than the model has"
    pairs = list(zip(parameters, scales, strict=True))
    kinds = sorted(set(scales), key=lambda scale: (scale != 1, scale))
    return [{"params": [p for p, scale in pairs if scale == kind], "lr_scale": kind} for kind in kinds]


def _scale_of(name: str, lr_scales: Mapping[str, float]) -> float:
    found = {pattern: scale for pattern, scale in lr_scales.items() if pattern in name}
    if len(set(found.values())) > 1:
        raise ValueError(f"lr_scales gives {name!r} several factors, {found}; make the patterns exclude each other")
    return next(iter(found.values()), 1.0)


def _check_found(pattern: str, names: Iterable[str], *, where: str) -> None:
    names = list(names)
    if any(pattern in name for name in names):
        return
    parts = {part for name in names for part in name.split(".")} | {name.rpartition(".")[0] for name in names}
    raise ValueError(
        f"{where}: {pattern!r} is in none of the {len(names)} names of trainable parameters; "
        f"{nearest(pattern.strip('.'), parts)}"
    )
