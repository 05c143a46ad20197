"""Builds what a distillation trains and what it learns from: generator, critic, teacher, the expert before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from opensora_like import runtime as rt
from opensora_like.boosters.base import Booster, OptimizerFactory
from opensora_like.boosters.pair import CRITIC, GENERATOR, PairBooster
from opensora_like.checkpoint.adapters import merge_adapters
from opensora_like.checkpoint.weights import found_sources
from opensora_like.conditioning.encode import Encode
from opensora_like.models.base import Denoiser, TextEncoder, encoders_of
from opensora_like.models.lora import adapters_off, dropout_of
from opensora_like.runtime import Runtime, logger
from opensora_like.schedulers.few_step import check_times
from opensora_like.settings import Distill, RunConfig
from opensora_like.training.compilation import compile_blocks
from opensora_like.training.distill import DistillScheduler, DistillStep, Network, Networks, updates_of_generator
from opensora_like.training.ema import EMA
from opensora_like.training.errors import ErrorOptions


@dataclass(frozen=True)
class Trained:
    """What a run trains.

    Args:
        forward: the denoiser as the booster wrapped it.
        booster: of the denoiser, where another model is trained beside it.
        step_fn: batch -> loss.
        take_turn: told the number of each update, from 0, before it. Returns: whose it is, for the metrics.
    """

    forward: nn.Module
    booster: Booster
    step_fn: Callable[..., Tensor]
    ema: EMA | None
    take_turn: Callable[[int], str] = lambda step: ""


def check_distill(cfg: RunConfig) -> Distill:
    """The section `distill` of a run that has one, once it fits the others; nothing is built yet.

    Raises:
        ValueError: numbers that cannot be, or other settings that would be ignored or mean something else.
    """
    settings = Distill(**cfg.distill)
    check_times(settings.times, where="distill.times")
    for name, least in (("gen_update_interval", 1), ("real_guidance", 0), ("fake_guidance", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"distill.{name}={getattr(settings, name)} must be {least} or more")
    if not settings.real_guidance:
        raise ValueError("distill.real_guidance=0 is a teacher that does not hear the captions; 1 is without guidance")
    if settings.critic_lr <= 0:
        raise ValueError(f"distill.critic_lr={settings.critic_lr} must be above 0")
    if settings.negative_prompt and {settings.real_guidance, settings.fake_guidance} <= {0.0, 1.0}:
        raise ValueError("distill.negative_prompt is read with guidance only; set real_guidance above 1, or remove it")
    _check_experts(cfg, settings)
    for name, is_read, why in (
        ("validation", cfg.validation is None, "its losses are those of flow matching; use sample_every"),
        ("peak_tflops", cfg.peak_tflops is None, "a step has more forwards than are counted"),
        ("load_sharded", not cfg.load_sharded, "each rank reads the teacher whole"),
        ("no_i2v_ref_loss", not cfg.no_i2v_ref_loss, "clips are no part of the loss"),
        ("motion_loss_ratio", not cfg.motion_loss_ratio, "clips are no part of the loss"),
        ("lora_config.lora_dropout", not dropout_of(cfg.lora_config), "it would make scores noisy"),
    ):
        if not is_read:
            raise ValueError(f"{name} cannot be set with distill: {why}; remove it")
    return settings


def _check_experts(cfg: RunConfig, settings: Distill) -> None:
    boundary, before = settings.boundary, settings.before
    if boundary is None:
        if before is not None:
            raise ValueError(f"distill.before={before!r} is the expert above a boundary; set distill.boundary")
        return
    if not 0 < boundary < 1:
        raise ValueError(f"distill.boundary={boundary} must be between 0 and 1")
    if before is not None and ("from_pretrained" not in before or set(before) - {"from_pretrained", "lora_checkpoint"}):
        raise ValueError(
            f"distill.before={before!r} has from_pretrained, the weights of the high expert, and may have "
            "lora_checkpoint, its adapters; nothing else"
        )
    name, value, fits = "t_min", cfg.scheduler.get("t_min", 0.0), "from it up"
    is_right = value >= boundary
    if before is not None:
        name, value, fits = "t_max", cfg.scheduler.get("t_max", 1.0), "up to it"
        is_right = value <= boundary
    if not is_right:
        raise ValueError(
            f"distill.boundary={boundary}: the teacher of this expert knows times {fits} alone, and scheduler.{name}="
            f"{value} has scores beyond; set scheduler.{name}={boundary} and scheduler.window='truncate'"
        )


def check_generator(model: Denoiser) -> None:
    """Raises ValueError: a model that puts given frames in the place of noise."""
    takes_frames = "visual" in model.condition_names and hasattr(model, "start_of")
    if getattr(model, "token_replace", False) or takes_frames:
        raise ValueError(
            "model.token_replace=True: what is predicted of given frames means nothing, and distill scores all frames; "
            "use a model that is given frames in channels, or text alone"
        )


def prepare_distilled(
    cfg: RunConfig,
    runtime: Runtime,
    booster: PairBooster,
    generator: Denoiser,
    make_optimizer: OptimizerFactory,
    encode: Encode,
    scheduler: DistillScheduler,
    *,
    build_model: Callable[[RunConfig], Denoiser],
    around_forward: Callable[[], AbstractContextManager[None]],
) -> Trained:
    """Build critic and teacher as the generator was built, and let the booster take what is trained.

    Args:
        generator: with its adapters, if it has any; not prepared yet.
        build_model: see training/build.py, which imports this module.

    Raises:
        ValueError: settings that do not fit the model, or weights that do not.
    """
    settings = check_distill(cfg)
    check_generator(generator)
    null = null_conditions(encode.encoders, settings)  # before anything that takes long
    device, dtype = runtime.device, rt.DTYPES[cfg.dtype]
    forward = booster.prepare(nn.ModuleDict({GENERATOR: generator}), make_optimizer)[GENERATOR]
    critic = build_model(cfg)
    if cfg.compile_blocks is not None:
        compile_blocks(critic, cfg.compile_blocks)
    critic = booster.prepare(nn.ModuleDict({CRITIC: critic}), make_optimizer)[CRITIC]
    frozen = partial(_frozen, booster=booster.parts[GENERATOR], device=device, dtype=dtype)
    called = _network(forward, dtype)
    networks = Networks(
        generator=called,
        critic=_network(critic, dtype),
        real=_network(frozen(build_model(cfg)), dtype)
        if cfg.lora_config is None
        else _without_adapters(forward, called),
        before=_network(frozen(_build_before(cfg, settings, build_model)), dtype) if settings.before else None,
    )
    for role, lr in ((GENERATOR, cfg.optim["lr"]), (CRITIC, settings.critic_lr)):
        for group in booster.parts[role].param_groups:
            group["base_lr"] = lr * group.get("lr_scale", 1.0)
    step_fn = DistillStep(
        networks,
        encode,
        scheduler,
        settings=settings,
        errors=ErrorOptions(error_cut=cfg.error_cut),
        null=null,
        seed=cfg.seed,
        dtype=dtype,
        around_forward=around_forward,
    )
    main, interval = booster.parts[GENERATOR], settings.gen_update_interval
    ema = None
    if cfg.ema_decay is not None:
        ema = EMA(main, cfg.ema_decay, updates_of=partial(updates_of_generator, interval=interval))

    def take_turn(step: int) -> str:
        role = step_fn.take_turn(step)
        booster.take_turn(role)
        return role

    return Trained(forward, main, step_fn, ema, take_turn)


def null_conditions(encoders: Mapping[str, TextEncoder], settings: Distill) -> dict[str, Tensor]:
    """The negative prompt in place of captions, each [1, ...]; {} where no guidance asks for it.

    Raises:
        ValueError: an encoder takes captions together with images.
    """
    if {settings.real_guidance, settings.fake_guidance} <= {0.0, 1.0}:
        return {}
    if mixed := encoders_of("captioned image", encoders):
        raise ValueError(
            f"encoders.{mixed[0]} reads captions together with images, which distill cannot guide by; set "
            "distill.real_guidance=1.0"
        )
    with torch.no_grad():
        return {name: encoders[name].encode([settings.negative_prompt]) for name in encoders_of("text", encoders)}


def _build_before(cfg: RunConfig, settings: Distill, build_model: Callable[[RunConfig], Denoiser]) -> Denoiser:
    """The high expert, with its adapters merged."""
    assert settings.before is not None
    before = found_sources(settings.before, ["from_pretrained", "lora_checkpoint"], where="distill.before.")
    plain = replace(
        cfg,
        model={**cfg.model, "from_pretrained": before["from_pretrained"]},
        lora_config=None,
        lora_checkpoint=None,
        trainable_modules=None,
    )
    model = build_model(plain)
    if (adapters := before.get("lora_checkpoint")) is not None:
        where = "distill.before.lora_checkpoint"
        number = merge_adapters(model, adapters, where=where, use_ema=True)
        logger.info("%s %s: %d tensors merged", where, adapters, number)
    return model


def _frozen(model: Denoiser, *, booster: Booster, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """In `dtype` on the device, sharded by a booster that can; buffers keep their dtype, as they do in boosters."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False).eval()
    return booster.shard_frozen(model) if hasattr(booster, "shard_frozen") else model.to(device)


def _network(model: nn.Module, dtype: torch.dtype) -> Network:
    """Called with float32 latents, and answering so."""
    return lambda x, t_B, conditions: model(x.to(dtype), t_B, dict(conditions)).float()


def _without_adapters(model: nn.Module, network: Network) -> Network:
    """The frozen weights under the generator's adapters: the teacher itself, without another copy of it."""

    def teacher(x: Tensor, t_B: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        with adapters_off(model):
            return network(x, t_B, conditions)

    return teacher
