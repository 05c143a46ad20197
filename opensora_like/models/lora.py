"""Low-rank adapters on a frozen denoiser, by peft: put in, named, merged into the weights.

Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"
# what peft.LoraConfig takes that would train, or add, more than adapters of linears
REFUSED = ("modules_to_save", "trainable_token_indices", "layer_replication", "megatron_config", "megatron_core")

KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights; the others change what is frozen


def add_lora(model: nn.Module, lora_config: Mapping[str, Any], *, seed: int) -> None:
    """Freeze `model` and put trainable float32 adapters into its linears; its outputs stay what they were.

    The adapters' first weights depend on `seed` alone. With ``lora_dropout`` above 0 the caller seeds torch's own
    generator before every forward.

    Args:
        lora_config: arguments of ``peft.LoraConfig``: r, lora_alpha, target_modules, lora_dropout...

    Raises:
        ValueError: an argument that is unknown or cannot be honoured, or target_modules that are nowhere in the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not lora_config.get("target_modules"):
        raise ValueError(
            "lora_config.target_modules is not set; name linears by the ends of their names, for example "
            f"{_ends_of_linears(model)[:6]}"
        )
    for key in REFUSED:
        if lora_config.get(key) is not None:
            raise ValueError(f"lora_config.{key}={lora_config[key]!r} is not supported: only adapters are trained")
    if lora_config.get("bias", "none") != "none":
        raise ValueError(f"lora_config.bias={lora_config['bias']!r}: only adapters are trained; use 'none'")
    if (begins := lora_config.get("init_lora_weights", True)) not in KEEPS_WEIGHTS:
        raise ValueError(
            f"lora_config.init_lora_weights={begins!r} changes the frozen weights, which neither checkpoints nor "
            f"exported adapters hold; use one of {KEEPS_WEIGHTS}"
        )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            settings = {k: list(v) if isinstance(v, tuple) else v for k, v in lora_config.items()}
            inject_adapter_in_model(LoraConfig(**settings), model, adapter_name=ADAPTER)
        except (TypeError, ValueError) as problem:  # TypeError: a name that LoraConfig does not know
            raise ValueError(
                f"lora_config={dict(lora_config)!r}: {problem}; linears end in {_ends_of_linears(model)}"
            ) from problem
    for parameter in adapters_of(model).values():
        parameter.data = parameter.data.float()


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter, in our naming or in that of peft's files."""
    return ".lora_" in name


def own_name(name: str) -> str:
    """Our name of an adapter's tensor from that in a file of peft, which leaves the adapter's name out."""
    name = name.removeprefix("base_model.model.")
    head, dot, kind = name.rpartition(".")
    if f".{ADAPTER}" in name:
        return name
    return f"{head}.{ADAPTER}.{kind}" if kind in ("weight", "bias") else f"{head}{dot}{kind}.{ADAPTER}"


def file_name(name: str) -> str:
    """Undo `own_name`: what peft and diffusers call the tensor in a file."""
    return "base_model.model." + name.replace(f".{ADAPTER}", "")


@torch.no_grad()
def merge_lora(model: nn.Module, *, strength: float = 1.0) -> None:
    """Add the adapters to the weights that they adapt and take them out: plain linears under plain names again.

    Args:
        strength: what they are multiplied with.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in adapted:
        module.scaling[ADAPTER] *= strength
        module.merge(safe_merge=True, adapter_names=[ADAPTER])
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, module.get_base_layer())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`model`, wrapped or not, computes within as it would without its adapters; not for what is differentiated."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:  # peft's own switch also turns requires_grad off, which a booster must not see
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in adapted:
            module._disable_adapters = False


def dropout_of(lora_config: Mapping[str, Any] | None) -> float:
    """Probability of dropping an input of an adapter."""
    return float((lora_config or {}).get("lora_dropout", 0.0))


def put_adapters(model: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> int:
    """Copy the adapters in `weights`, under our names or peft's, into those of `model`. Returns: how many tensors.

    Raises:
        ValueError: not exactly the adapters that the model has.
    """
    given = {own_name(n): w for n, w in weights.items() if is_adapter(n)}
    own = adapters_of(model)
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{n}: {tuple(given[n].shape)} given, {tuple(p.shape)} here"
        for n, p in own.items()
        if n in given and p.shape != given[n].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{where} holds other adapters than lora_config makes: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}, {len(shapes)} of another shape {shapes[:2]}; "
            "use the lora_config that they were trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])
    return len(own)


def _ends_of_linears(model: nn.Module) -> list[str]:
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
