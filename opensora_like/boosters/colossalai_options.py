"""What ``plugin_config`` of the colossalai booster may hold, plugin by plugin."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from opensora_like.boosters.plan import divisors
from opensora_like.registry import fit, nearest

WHERE = "booster.plugin_config"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# ColossalAI's names -> ours, in `sequence_parallel`
SEQUENCE_MODES = {"all_to_all": "all_to_all", "ring_attn": "ring"}
SPLIT_GATHER = "split_gather"  # of hybrid alone: the ranks that share linears share the tokens, too

# arguments of ColossalAI's plugins that plugin_config has no use for -> why
ELSEWHERE = {
    "precision": "it is the run's dtype; set that",
    "max_norm": "it is the run's grad_clip; set that",
    "cast_inputs": "models cast their inputs themselves, all but t; remove it",
    "custom_policy": "it is made from the model's parallel_plan(); remove it",
    "enable_metadata_cache": "it is of pipelines, which are not supported; remove it",
}


@dataclass(frozen=True)
class ZeroOptions:
    """``plugin_config`` of zero1 and zero2; the names are ColossalAI's.

    Args:
        reduce_bucket_size_in_m: gradients are reduced in buckets of this many million (2**20) elements.
        overlap_allgather: let the weights arrive during the next forward, in the order in which it needs them.
        overlap_communication: reduce gradients during the backward. None: where the device can.
        cpu_offload: keep masters and optimizer state in host memory, and update there.
        communication_dtype: of gradients on the wire. None: the dtype of the weights.
        master_weights: only True: checkpoints and the EMA need float32 masters.
        initial_scale: only None: a loss is scaled in float16 alone.
    """

    reduce_bucket_size_in_m: int = 20
    overlap_allgather: bool = False
    overlap_communication: bool | None = None
    cpu_offload: bool = False
    communication_dtype: Literal["bf16", "fp32"] | None = None
    master_weights: bool = True
    initial_scale: float | None = None


@dataclass(frozen=True)
class SequenceOptions(ZeroOptions):
    """``plugin_config`` of zero1-seq and zero2-seq.

    Args:
        sp_size: ranks that share the tokens of a sample.
        sequence_parallelism_mode: "all_to_all" exchanges heads for tokens, "ring_attn" passes keys and values round.
    """

    sp_size: int = 1
    sequence_parallelism_mode: str = "all_to_all"


@dataclass(frozen=True)
class HybridOptions(ZeroOptions):
    """``plugin_config`` of hybrid.

    Args:
        tp_size: ranks that share each linear and each head of attention, as the model's plan says.
        pp_size: only 1.
        sp_size: ranks that share the tokens of a sample.
        enable_sequence_parallelism: must be True where `sp_size` or the mode is set.
        sequence_parallelism_mode: see `SequenceOptions`; None is "all_to_all". Or "split_gather", which cuts the
            tokens between the cut linears over the `tp_size` ranks, in place of `sp_size`.
        zero_stage: 0 replicates weights, gradients and optimizer over data and sequence ranks, 1 shards the
            optimizer over them, 2 the gradients as well.
        static_graph: promises DDP (`zero_stage` 0) that every step takes the same way through the model; it then
            reduces in every backward. ZeRO has no use for the promise, and accepts it.
        find_unused_parameters: for models of which a step at `zero_stage` 0 may leave parameters out; costs a walk of
            the graph. ZeRO needs no such key, and refuses it.
    """

    tp_size: int = 1
    pp_size: int = 1
    sp_size: int = 1
    enable_sequence_parallelism: bool = False
    sequence_parallelism_mode: str | None = None
    zero_stage: Literal[0, 1, 2] = 0
    static_graph: bool = False
    find_unused_parameters: bool = False


Options = TypeVar("Options", bound=ZeroOptions)


def read_options(config: Mapping[str, Any], *, plugin: str, device: torch.device) -> ZeroOptions:
    """The options of zero1 or zero2, checked.

    Raises:
        ValueError: an unknown key, a value of another type, or one that this device or booster cannot honour.
    """
    return _read(ZeroOptions, config, plugin=plugin, device=device)


def read_sequence_options(config: Mapping[str, Any], *, plugin: str, device: torch.device) -> SequenceOptions:
    """The options of zero1-seq or zero2-seq, checked; see `read_options`."""
    options = _read(SequenceOptions, config, plugin=plugin, device=device)
    _check_mode(options.sequence_parallelism_mode, plugin)
    _check_at_least_1(options, ("sp_size",))
    return options


def read_hybrid_options(config: Mapping[str, Any], *, plugin: str, device: torch.device) -> HybridOptions:
    """The options of hybrid, checked; see `read_options`."""
    options = _read(HybridOptions, config, plugin=plugin, device=device)
    _check_at_least_1(options, ("tp_size", "pp_size", "sp_size"))
    if options.pp_size > 1:
        raise ValueError(
            f"{WHERE}.pp_size={options.pp_size}: pipelines are not supported; use 1, and tp_size, sp_size or zero_stage"
        )
    mode = options.sequence_parallelism_mode
    if mode is not None:
        _check_mode(mode, plugin)
    if not options.enable_sequence_parallelism:
        for key, given in (("sp_size", options.sp_size > 1), ("sequence_parallelism_mode", mode is not None)):
            if given:
                raise ValueError(
                    f"{WHERE}.{key}={getattr(options, key)!r} has no effect while {WHERE}.enable_sequence_parallelism"
                    " is False; set it to True"
                )
    if mode == SPLIT_GATHER:
        _check_split_gather(options)
    if options.zero_stage == 0:
        _check_without_zero(config)
    elif options.find_unused_parameters:
        raise ValueError(
            f"{WHERE}.find_unused_parameters=True has no effect while {WHERE}.zero_stage is {options.zero_stage}: ZeRO"
            " takes a step that leaves parameters out as it is; remove it"
        )
    return dataclasses.replace(options, sequence_parallelism_mode=mode or "all_to_all")


def check_world(options: SequenceOptions | HybridOptions, world_size: int) -> None:
    """Check that the processes fill whole groups.

    Raises:
        ValueError: tp_size x sp_size does not divide `world_size`.
    """
    sizes = {key: getattr(options, key, 1) for key in ("tp_size", "sp_size")}
    product = sizes["tp_size"] * sizes["sp_size"]
    if world_size % product:
        named = " x ".join(f"{WHERE}.{key}={size}" for key, size in sizes.items() if size > 1)
        raise ValueError(
            f"{named} needs a multiple of {product} processes, there are {world_size}; start {product} or a multiple,"
            f" or choose sizes whose product is one of {divisors(world_size)}"
        )


def check_dtype(options: HybridOptions, dtype: str) -> None:
    """ColossalAI's hybrid ZeRO works on half precision only.

    Raises:
        ValueError: a stage above 0 in float32.
    """
    if options.zero_stage > 0 and dtype == "fp32":
        raise ValueError(
            f"{WHERE}.zero_stage={options.zero_stage} of plugin 'hybrid' needs dtype='bf16', got dtype='fp32'; use"
            " zero_stage=0, dtype='bf16', or in float32 plugin 'zero1', 'zero2' or 'zero1-seq'"
        )


def _read(kind: type[Options], config: Mapping[str, Any], *, plugin: str, device: torch.device) -> Options:
    known, hints = [f.name for f in dataclasses.fields(kind)], typing.get_type_hints(kind)
    for key in config:
        if key not in known:
            hint = ELSEWHERE.get(key) or nearest(str(key), known)
            raise ValueError(f"{WHERE}.{key}: plugin {plugin!r} has no such option; {hint}")
    options = kind(**{k: fit(v, hints[k], f"{WHERE}.{k}") for k, v in config.items()})
    _check_at_least_1(options, ("reduce_bucket_size_in_m",))
    if not options.master_weights:
        raise ValueError(f"{WHERE}.master_weights=False: checkpoints and EMA need float32 masters; remove it")
    if options.initial_scale is not None:
        raise ValueError(f"{WHERE}.initial_scale={options.initial_scale}: only float16 scales its loss; remove it")
    if device.type == "cpu" and options.overlap_communication:
        raise ValueError(f"{WHERE}.overlap_communication=True needs a GPU (a CPU has no streams); remove it")
    if options.overlap_communication is None:
        return dataclasses.replace(options, overlap_communication=device.type != "cpu")
    return options


def _check_at_least_1(options: ZeroOptions, keys: Iterable[str]) -> None:
    for key in keys:
        if getattr(options, key) < 1:
            raise ValueError(f"{WHERE}.{key}={getattr(options, key)} must be 1 or more")


def _check_mode(mode: str, plugin: str) -> None:
    where = f"{WHERE}.sequence_parallelism_mode={mode!r}"
    if mode == "ring":
        raise ValueError(
            f"{where} is not supported: its backward in ColossalAI 0.5.0 gives wrong gradients; 'split_gather' of"
            " plugin 'hybrid' cuts the same tensors"
        )
    if mode == SPLIT_GATHER and plugin != "hybrid":
        raise ValueError(
            f"{where} cuts tokens over ranks that share linears, and plugin {plugin!r} cuts none; use plugin 'hybrid'"
            f" with {WHERE}.tp_size, or one of {sorted(SEQUENCE_MODES)}"
        )
    known = sorted([*SEQUENCE_MODES, SPLIT_GATHER])
    if mode not in known:
        raise ValueError(f"{where} is not known; {nearest(mode, known)}")


def _check_split_gather(options: HybridOptions) -> None:
    where = f"{WHERE}.sequence_parallelism_mode={SPLIT_GATHER!r}"
    if options.tp_size == 1:
        raise ValueError(
            f"{where} cuts tokens over the ranks that share linears, and {WHERE}.tp_size is 1; make it 2 or more, or"
            f" use one of {sorted(SEQUENCE_MODES)}"
        )
    if options.sp_size > 1:
        raise ValueError(
            f"{WHERE}.sp_size={options.sp_size} has no effect with {where}, which cuts tokens over the"
            f" {WHERE}.tp_size={options.tp_size} ranks; remove it, or use one of {sorted(SEQUENCE_MODES)}"
        )


def _check_without_zero(config: Mapping[str, Any]) -> None:
    """What only ZeRO honours must not be set without it; False is no setting, but where the default is None."""
    for key in ("overlap_allgather", "cpu_offload", "communication_dtype", "overlap_communication"):
        value = config.get(key)
        if value is not None and (value or key == "overlap_communication"):
            raise ValueError(
                f"{WHERE}.{key}={value!r} has no effect while {WHERE}.zero_stage is 0; remove it, or use stage 1 or 2"
            )
