"""From a config to a run that is ready to start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from opensora_like import runtime as rt
from opensora_like.boosters.base import Booster
from opensora_like.boosters.pair import PairBooster
from opensora_like.boosters.text_encoder_parallel import cut_t5
from opensora_like.checkpoint.facts import frozen_facts
from opensora_like.checkpoint.layout import check_kept
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.conditioning.encode import Encode
from opensora_like.conditioning.sharing import Sharing, build_sharing
from opensora_like.config import config_text, to_dict
from opensora_like.datasets.balance import Balance
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.cost import tokens_of
from opensora_like.datasets.loader import BadSampleLog
from opensora_like.datasets.plan import (
    has_constant_length,
    order_key,
    steps_in_epoch,
)
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.models.lora import dropout_of
from opensora_like.registry import BOOSTERS, MODELS, SCHEDULERS, build
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.adapters import add_adapters
from opensora_like.training.batch_size import with_batch_sizes
from opensora_like.training.cached import Cached, open_cached
from opensora_like.training.compilation import compile_parts
from opensora_like.training.data import batches_from, build_balance, grid_of, loss_weights, make_plan_of
from opensora_like.training.data_checks import build_checked_dataset, build_outline
from opensora_like.training.distill_roles import Trained, check_distill, prepare_distilled
from opensora_like.training.ema import EMA
from opensora_like.training.errors import error_options
from opensora_like.training.offload import build_offload
from opensora_like.training.optim import build_rates, optimizer_factory
from opensora_like.training.pretrained import Unfilled, build_unfilled, log_peak_memory
from opensora_like.training.resume import (
    begin_with_a_whole_step,
    check_load,
    load_state,
    log_report,
    with_found_sources,
)
from opensora_like.training.run_folder import open_run_folder
from opensora_like.training.spikes import SpikeGuard
from opensora_like.training.step import FlowMatchingStep, Scheduler
from opensora_like.training.throughput import build_throughput
from opensora_like.training.trainable import choose_trainable, lr_scales_of
from opensora_like.training.trainer import Run, Schedule
from opensora_like.training.validation import Observer, Watched, build_watch
from opensora_like.training.weight_checks import check_before_weights


def build_run(
    cfg: RunConfig, runtime: Runtime, *, config_name: str, observe: Callable[[Watched], Observer] | None = None
) -> Run:
    """Build everything, load what `cfg.load` names, and stand at the first step to make.

    Args:
        config_name: path of the config file, for the default name of the run.
        observe: makes what `validation` and `sample_every` report to.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint.
        FileNotFoundError: a table, a file of weights or a checkpoint that is not there.
    """
    asked = with_found_sources(cfg)  # once and for all, also for what checkpoints say they stand on
    cfg = with_batch_sizes(asked, runtime.world_size)
    offload = build_offload(cfg.grad_ckpt_buffer_size, runtime.device)
    folder, lock = open_run_folder(asked, runtime, config_name)
    rt.set_up_logging(runtime, folder / "log.txt")
    check_load(cfg, folder)
    check_kept(cfg.keep_n_latest, cfg.keep_every)
    booster = build_booster(cfg, runtime)
    cached = open_cached(cfg)
    outline = build_outline(cfg, cached)
    dataset = build_checked_dataset(cfg, runtime, booster, outline)
    scheduler = build(cfg.scheduler, SCHEDULERS, where="scheduler", patch_size=outline.model.patch_size)
    length = epoch_length(cfg, dataset)
    make_schedule(cfg, booster, TrainState(), length=length)  # refuses what it has to before weights are made and read
    check_before_weights(cfg, outline, dataset, scheduler, cached)
    unfilled = build_unfilled(cfg, booster, runtime.world_size)  # from here on weights are made and read
    model = build_model(cfg) if unfilled is None else unfilled.model
    tensor_group = getattr(booster, "tensor_group", None)
    autoencoder, encoders = build_frozen(cfg, runtime.device, tensor_group=tensor_group, cached=cached)
    sharing = build_sharing(booster.dp_rank, dp_size=booster.dp_size)
    dealing = sharing if cached is None else None  # cached latents are read where they are used
    encode = build_encode(cfg, runtime.device, model, autoencoder, encoders, sharing=sharing)
    compile_parts(cfg, model, autoencoder)
    trained = prepare(cfg, runtime, booster, model, unfilled, encode, scheduler, offload or nullcontext)
    ema, step_fn = trained.ema, trained.step_fn
    balance = build_balance(cfg, dataset, autoencoder, encoders)
    plan_of = make_plan_of(cfg, runtime, dataset, balance)
    checkpoints = build_checkpoints(cfg, runtime, folder, dataset, booster, ema, balance, text=config_text(asked))
    watched = Watched(cfg, runtime, folder, model, trained.forward, autoencoder, encoders, trained.booster, ema)
    watch = build_watch(watched, observe, step_fn, dataset, build_encode=build_encode)
    load = partial(load_state, cfg, folder, checkpoints, micro_per_step=booster.dp_size * cfg.accumulation_steps)
    state = load() if watch is None else watch.around_load(load, base_is_loaded=cfg.load_weights_only)
    begin_with_a_whole_step(state, plan_of, micro_per_step=booster.dp_size * cfg.accumulation_steps)
    schedule = make_schedule(cfg, booster, state, length=length)
    log_summary(cfg, runtime, dataset, model, schedule, state, dp_size=booster.dp_size)
    log_peak_memory(runtime)
    return Run(
        runtime=runtime,
        schedule=schedule,
        booster=booster,
        step_fn=step_fn,
        batches=batches_from(cfg, runtime, dataset, plan_of, booster, state, dealing=dealing),
        plan_of=plan_of,
        checkpoints=checkpoints,
        writers=make_writers(cfg, runtime, folder, state.step),
        ema=ema,
        state=state,
        on_batch=BadSampleLog(folder / "bad_samples.jsonl", max_bad_fraction=cfg.max_bad_fraction).record,
        weights_of=loss_weights(cfg, booster, plan_of, tokens_of(dataset.buckets, grid_of(autoencoder, dataset))),
        throughput=build_throughput(cfg, encoders, grid_of(autoencoder, dataset)),
        spikes=SpikeGuard(cfg.spike_factor),
        lock=lock,
        watch=watch,
        gc_every=cfg.gc_every,
        before_step=trained.take_turn,
    )


def prepare(
    cfg: RunConfig,
    runtime: Runtime,
    booster: Booster,
    model: Denoiser,
    unfilled: Unfilled | None,
    encode: Encode,
    scheduler: Scheduler,
    around_forward: Callable[[], AbstractContextManager[None]],
) -> Trained:
    """Let `booster` take the model, and with `distill` the critic as well; then fill it, if it was built unfilled."""
    scales = lr_scales_of(model, cfg.lr_scales)
    make_optimizer = optimizer_factory(cfg.optim, device=runtime.device, lr_scales=scales)
    if isinstance(booster, PairBooster):
        parts = (cfg, runtime, booster, model, make_optimizer, encode, scheduler)
        return prepare_distilled(*parts, build_model=build_model, around_forward=around_forward)
    wrapped = booster.prepare(model, make_optimizer)
    if unfilled is not None:
        unfilled.fill(booster)
    for group in booster.param_groups:
        group["base_lr"] = cfg.optim["lr"] * group.get("lr_scale", 1.0)
    ema = EMA(booster, cfg.ema_decay) if cfg.ema_decay is not None else None
    step_fn = build_step(cfg, wrapped, encode, scheduler, around_forward=around_forward)
    return Trained(wrapped, booster, step_fn, ema)


def build_step(
    cfg: RunConfig,
    model: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    encode: Encode,
    scheduler: Scheduler,
    *,
    around_forward: Callable[[], AbstractContextManager[None]],
) -> FlowMatchingStep:
    """The step; `model` is the wrapped one."""
    return FlowMatchingStep(
        model,
        encode,
        scheduler,
        seed=cfg.seed,
        dtype=rt.DTYPES[cfg.dtype],
        errors=error_options(cfg),
        dropout=dropout_of(cfg.lora_config) > 0,
        around_forward=around_forward,
    )


def build_model(cfg: RunConfig) -> Denoiser:
    """The denoiser in float32 on the CPU, the same on every rank, with published weights where asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = build(cfg.model, MODELS, where="model")
    if model.from_pretrained:
        where = "model.from_pretrained"
        report = load_pretrained(model, model.from_pretrained, where=where, strict=model.strict_load)
        log_report(f"{where} {model.from_pretrained}", report)
    choose_trainable(cfg, model)
    add_adapters(cfg, model)
    return model


def build_frozen(
    cfg: RunConfig, device: torch.device, *, tensor_group: ProcessGroup | None = None, cached: Cached | None = None
) -> tuple[Autoencoder, dict[str, TextEncoder]]:
    """Autoencoder and text encoders, frozen, on the device; those with ``tp`` cut over `tensor_group`.

    Args:
        cached: the stand-ins of a run on cached latents, as `open_cached` gives them.

    Raises:
        ValueError: an encoder with ``tp`` where the booster has no group for it.
    """
    for name, section in cfg.encoders.items():
        if section.get("tp") and tensor_group is None:
            raise ValueError(
                f"encoders.{name}.tp=True needs tensor parallelism, and booster={dict(cfg.booster)!r} has none"
            )
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder") if cached is None else cached.autoencoder
    encoders = dict(cached.encoders) if cached is not None else {}
    missing = {name: section for name, section in cfg.encoders.items() if name not in encoders}
    encoders |= {name: build(section, MODELS, where=f"encoders.{name}") for name, section in missing.items()}
    for encoder in encoders.values():
        if getattr(encoder, "tp", False):
            encoder.cut(partial(cut_t5, group=tensor_group))
    for module in (autoencoder, *encoders.values()):
        module.requires_grad_(False).eval().to(device)
    return autoencoder, encoders


def build_booster(cfg: RunConfig, runtime: Runtime) -> Booster:
    """The training backend of `cfg.booster`; with `distill` two of them, for two models in turns."""
    if cfg.distill is None:
        return _build_booster(cfg, runtime)
    check_distill(cfg)
    return PairBooster(_build_booster(cfg, runtime), _build_booster(cfg, runtime))


def _build_booster(cfg: RunConfig, runtime: Runtime) -> Booster:
    return build(
        cfg.booster,
        BOOSTERS,
        where="booster",
        device=runtime.device,
        dtype=cfg.dtype,
        grad_clip=cfg.grad_clip,
        accumulation_steps=cfg.accumulation_steps,
    )


def build_encode(
    cfg: RunConfig,
    device: torch.device,
    model: Denoiser,
    autoencoder: Autoencoder,
    encoders: Mapping[str, TextEncoder],
    *,
    sharing: Sharing | None = None,
) -> Encode:
    """What turns batches into the model's inputs."""
    return Encode(
        model,
        autoencoder,
        encoders,
        seed=cfg.seed,
        device=device,
        dropout_ratio=cfg.dropout_ratio,
        condition_config=cfg.condition_config,
        guidance=cfg.guidance,
        sample_posterior=cfg.sample_posterior,
        sharing=sharing,
        shapes_only=cfg.distill is not None,
    )


def build_checkpoints(
    cfg: RunConfig,
    runtime: Runtime,
    folder: Path,
    dataset: ClipDataset,
    booster: Booster,
    ema: EMA | None,
    balance: Balance | None,
    *,
    text: str,
) -> CheckpointManager:
    """Where the run's checkpoints go, and what is written beside the tensors."""
    return CheckpointManager(
        folder,
        booster,
        ema=ema.shards if ema else None,
        config_text=text,
        keep_n_latest=cfg.keep_n_latest,
        keep_every=cfg.keep_every,
        order=order_key(
            dataset.table,
            dataset.buckets,
            fps_max=dataset.fps_max,
            seed=cfg.seed,
            balance=balance.key if balance else None,
        ),
        about={
            "world_size": runtime.world_size,
            "booster": dict(cfg.booster),
            "dtype": cfg.dtype,
            "seed": cfg.seed,
            **frozen_facts(cfg.trainable_modules, cfg.model.get("from_pretrained")),
        },
        async_io=cfg.async_io,
        on_save_error=cfg.on_save_error,
    )


def epoch_length(cfg: RunConfig, dataset: ClipDataset) -> int | None:
    """Micro-batches of each epoch of a run of `epochs`; None where they differ, or `steps` says when the run ends."""
    if cfg.steps is not None or not has_constant_length(dataset.plan(0)):
        return None
    return len(dataset.plan(0))


def make_schedule(cfg: RunConfig, booster: Booster, state: TrainState, *, length: int | None) -> Schedule:
    """Total steps from `steps`, or from what is left of `epochs` at `state`, as steps before it may have been of other
    sizes.

    Args:
        length: as `epoch_length` gives it.

    Raises:
        ValueError: a count that cannot be, or rates that cannot; see `build_rates`.
    """
    for name, least in (("steps", 1), ("epochs", 1), ("accumulation_steps", 1), ("log_every", 0), ("ckpt_every", 0)):
        if (value := getattr(cfg, name)) is not None and value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
    total = cfg.steps
    if length is not None:
        micro_per_step = booster.dp_size * cfg.accumulation_steps
        total = state.step
        if state.epoch < cfg.epochs:
            total += steps_in_epoch(length, micro_per_step, state.micro_batch)
            total += (cfg.epochs - state.epoch - 1) * steps_in_epoch(length, micro_per_step)
    return Schedule(
        total_steps=total,
        epochs=cfg.epochs,
        accumulation_steps=cfg.accumulation_steps,
        rates=build_rates(cfg, total_steps=total),
        log_every=cfg.log_every,
        ckpt_every=cfg.ckpt_every,
    )


def make_writers(cfg: RunConfig, runtime: Runtime, folder: Path, step: int) -> list[rt.MetricWriter]:
    """Metric writers of rank 0; rows after `step` of an earlier attempt are dropped."""
    if not runtime.is_main:
        return []
    writers: list[rt.MetricWriter] = [rt.JsonlWriter(folder / "metrics.jsonl", resume_step=step)]
    if cfg.tensorboard:
        writers.append(rt.TensorboardWriter(folder / "tensorboard", resume_step=step))
    if cfg.wandb:
        settings = json.loads(json.dumps(to_dict(cfg), default=str))
        writers.append(rt.WandbWriter(folder, project=cfg.wandb_project, name=folder.name, config=settings))
    return writers


def log_summary(
    cfg: RunConfig,
    runtime: Runtime,
    dataset: ClipDataset,
    model: Denoiser,
    schedule: Schedule,
    state: TrainState,
    *,
    dp_size: int,
) -> None:
    """One line each for data, model and schedule."""
    plan = dataset.plan(state.epoch)
    micro_per_step = dp_size * cfg.accumulation_steps
    logger.info(
        "data rows %d micro_batches %d steps_per_epoch %d workers %d",
        dataset.table.num_rows,
        len(plan),
        steps_in_epoch(len(plan), micro_per_step),
        cfg.num_workers,
    )
    trainable = sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)
    logger.info("model %s parameters %d dtype %s", cfg.model["type"], trainable, cfg.dtype)
    logger.info(
        "run device %s world_size %d booster %s from step %d to %s",
        runtime.device,
        runtime.world_size,
        dict(cfg.booster),
        state.step,
        schedule.total_steps if schedule.total_steps is not None else f"the end of epoch {schedule.epochs}",
    )
