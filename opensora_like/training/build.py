"""From a config to a run that is ready to start."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from opensora_like import runtime as rt
from opensora_like.boosters.base import Booster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.conditioning.encode import Encode
from opensora_like.config import config_text, to_dict
from opensora_like.datasets.ahead import build_ahead
from opensora_like.datasets.balance import Balance, balance_plan, micro_batch_weight
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.cost import CostModel, Grid, tokens_of
from opensora_like.datasets.loader import BadSampleLog, make_loader
from opensora_like.datasets.plan import (
    EpochPlan,
    Position,
    has_constant_length,
    order_key,
    rank_stream,
    steps_in_epoch,
)
from opensora_like.datasets.shards import ShardedTable
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.registry import BOOSTERS, DATASETS, MODELS, SCHEDULERS, build, fit_arguments
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.ema import EMA
from opensora_like.training.optim import optimizer_factory
from opensora_like.training.resources import derive_cost
from opensora_like.training.resume import load_state, log_report
from opensora_like.training.step import FlowMatchingStep
from opensora_like.training.trainer import Run, Schedule


def build_run(cfg: RunConfig, runtime: Runtime, *, config_name: str) -> Run:
    """Build everything, load what `cfg.load` names, and stand at the first step to make.

    Args:
        config_name: path of the config file, for the default name of the run.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint.
        FileNotFoundError: a table, a file of weights or a checkpoint that is not there.
    """
    folder, lock = open_run_folder(cfg, runtime, config_name)
    rt.set_up_logging(runtime, folder / "log.txt")
    model = build_model(cfg)
    autoencoder, encoders = build_frozen(cfg, runtime.device)
    dataset = build_dataset(cfg, multiple=autoencoder.spatial_stride * model.patch_size)
    encode = build_encode(cfg, runtime.device, model, autoencoder, encoders)
    scheduler = build(cfg.scheduler, SCHEDULERS, where="scheduler", patch_size=model.patch_size)
    booster = build_booster(cfg, runtime)
    wrapped = booster.prepare(model, optimizer_factory(cfg.optim, device=runtime.device))
    for group in booster.param_groups:
        group["base_lr"] = cfg.optim["lr"]
    ema = EMA(booster, cfg.ema_decay) if cfg.ema_decay is not None else None
    schedule = make_schedule(cfg, dataset, booster)
    balance = build_balance(cfg, dataset, autoencoder, encoders)
    plan_of = make_plan_of(cfg, runtime, dataset, balance)
    checkpoints = build_checkpoints(cfg, runtime, folder, dataset, booster, ema, balance)
    state = load_state(cfg, folder, checkpoints, micro_per_step=booster.dp_size * cfg.accumulation_steps)
    log_summary(cfg, runtime, dataset, model, schedule, state)
    return Run(
        runtime=runtime,
        schedule=schedule,
        booster=booster,
        step_fn=FlowMatchingStep(
            wrapped,
            encode,
            scheduler,
            seed=cfg.seed,
            dtype=rt.DTYPES[cfg.dtype],
            no_i2v_ref_loss=cfg.no_i2v_ref_loss,
        ),
        batches=batches_from(cfg, runtime, dataset, plan_of, booster, state),
        plan_of=plan_of,
        checkpoints=checkpoints,
        writers=make_writers(cfg, runtime, folder, state.step),
        ema=ema,
        state=state,
        on_batch=BadSampleLog(folder / "bad_samples.jsonl", max_bad_fraction=cfg.max_bad_fraction).record,
        weights_of=loss_weights(cfg, booster, plan_of, tokens_of(dataset.buckets, _grid(autoencoder, dataset))),
        lock=lock,
    )


def run_name(cfg: RunConfig, config_name: str) -> str:
    """``exp_name``, or date, time and the config's path below configs/."""
    if cfg.exp_name:
        return cfg.exp_name
    parts = Path(config_name).with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return f"{time.strftime('%y%m%d_%H%M%S')}-{'_'.join(below)}"


def open_run_folder(cfg: RunConfig, runtime: Runtime, config_name: str) -> tuple[Path, TextIO | None]:
    """Make the run's folder, refuse one that is in use or holds another run's checkpoints, write the config.

    Returns: the folder, and on rank 0 its lock: an open file; whoever holds it owns the folder.

    Raises:
        ValueError: ``load='latest'`` without a name, a folder in use, or one with checkpoints and no ``load``.
    """
    if cfg.load == "latest" and not cfg.exp_name:
        raise ValueError("load='latest' looks in the run's own folder; say which with --exp-name")
    folder = Path(cfg.outputs) / rt.broadcast_text(run_name(cfg, config_name))
    lock, problem = None, ""
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        problem = _occupied(folder, lock, is_new=cfg.load is None)
        if not problem:
            (folder / "config.py").write_text(config_text(cfg))
    if problem := rt.broadcast_text(problem):
        raise ValueError(problem)
    return folder, lock


def _occupied(folder: Path, lock: TextIO, *, is_new: bool) -> str:
    """Take the folder. Returns: what is wrong, "" if nothing."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return f"another run is training in {str(folder)!r}; stop it, or choose another --exp-name"
    layout.recover(folder)
    found = layout.complete_checkpoints(folder)
    if found and is_new:
        return (
            f"{str(folder)!r} already holds {found[-1].name}; continue it with --load latest, "
            "or choose another --exp-name"
        )
    return ""


def build_model(cfg: RunConfig) -> Denoiser:
    """The denoiser in float32 on the CPU, the same on every rank, with published weights where asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = build(cfg.model, MODELS, where="model")
    if model.from_pretrained:
        where = "model.from_pretrained"
        report = load_pretrained(model, model.from_pretrained, where=where, strict=model.strict_load)
        log_report(f"{where} {model.from_pretrained}", report)
    return model


def build_frozen(cfg: RunConfig, device: torch.device) -> tuple[Autoencoder, dict[str, TextEncoder]]:
    """Autoencoder and text encoders, frozen, on the device."""
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder")
    encoders = {name: build(c, MODELS, where=f"encoders.{name}") for name, c in cfg.encoders.items()}
    for module in (autoencoder, *encoders.values()):
        module.requires_grad_(False).eval().to(device)
    return autoencoder, encoders


def build_dataset(cfg: RunConfig, *, multiple: int) -> ClipDataset:
    """The dataset of `cfg.dataset`; `multiple` is what heights and widths must be a multiple of."""
    return build(
        cfg.dataset, DATASETS, where="dataset", bucket_config=cfg.bucket_config, multiple=multiple, seed=cfg.seed
    )


def build_balance(
    cfg: RunConfig, dataset: ClipDataset, autoencoder: Autoencoder, encoders: Mapping[str, TextEncoder]
) -> Balance | None:
    """How micro-batches are laid side by side, None for a random order.

    Raises:
        ValueError: unknown keys, numbers that cannot be, costs without a balance, or a model whose work cannot be
            counted; then `cost` has to be set.
    """
    if cfg.balance is None:
        if cfg.cost is not None:
            raise ValueError("cost is used by balance only, and balance is None; set balance or remove cost")
        return None
    options = fit_arguments(Balance, {"type": "balance", **cfg.balance}, where="balance", given={"costs": None})
    if cfg.cost is not None:
        cost = CostModel(**fit_arguments(CostModel, {"type": "cost", **cfg.cost}, where="cost"))
    else:
        cost = derive_cost(cfg.model, cfg.autoencoder, encoders, dataset.buckets)
        logger.info("cost %s", " ".join(f"{name} {value:.4g}" for name, value in vars(cost).items()))
    return Balance(cost.of_buckets(dataset.buckets, _grid(autoencoder, dataset)), **options)


def _grid(autoencoder: Autoencoder, dataset: ClipDataset) -> Grid:
    return Grid(autoencoder.temporal_stride, dataset.buckets.multiple)


def loss_weights(
    cfg: RunConfig, booster: Booster, plan_of: Callable[[int], EpochPlan], tokens: np.ndarray
) -> Callable[[Batch], Sequence[float]]:
    """First batch of a step -> weights of the losses of this rank's micro-batches; see `micro_batch_weight`."""
    micro_per_step = booster.dp_size * cfg.accumulation_steps

    def weights_of(first: Batch) -> Sequence[float]:
        if cfg.loss_weight == "per_micro_batch":
            return [1.0] * cfg.accumulation_steps
        position = Position(first.epoch, first.index - booster.dp_rank)
        weights = micro_batch_weight(plan_of(first.epoch), position, micro_per_step, cfg.loss_weight, tokens=tokens)
        return weights[booster.dp_rank :: booster.dp_size].tolist()

    return weights_of


def make_plan_of(
    cfg: RunConfig, runtime: Runtime, dataset: ClipDataset, balance: Balance | None
) -> Callable[[int], EpochPlan]:
    """Epoch -> its plan; the last one asked for is kept, and of a table in shards the next one is begun."""
    kept: dict[int, EpochPlan] = {}

    def plan_of(epoch: int) -> EpochPlan:
        if epoch not in kept:
            plan = dataset.plan(epoch)
            if balance is not None:
                plan = balance_plan(plan, balance, seed=cfg.seed)
            if isinstance(dataset.table, ShardedTable) and runtime.local_rank == 0:
                ahead = {"fps_max": dataset.fps_max, "seed": cfg.seed, "epoch": epoch + 1, "balance": balance}
                build_ahead(dataset.table, dataset.buckets, **ahead)
            for old in sorted(kept)[:-1]:  # two are kept: the loader is ahead of the step
                del kept[old]
            kept[epoch] = plan
        return kept[epoch]

    return plan_of


def build_booster(cfg: RunConfig, runtime: Runtime) -> Booster:
    """The training backend of `cfg.booster`."""
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
    )


def build_checkpoints(
    cfg: RunConfig,
    runtime: Runtime,
    folder: Path,
    dataset: ClipDataset,
    booster: Booster,
    ema: EMA | None,
    balance: Balance | None,
) -> CheckpointManager:
    """Where the run's checkpoints go, and what is written beside the tensors."""
    return CheckpointManager(
        folder,
        booster,
        ema=ema.shards if ema else None,
        config_text=config_text(cfg),
        keep_n_latest=cfg.keep_n_latest,
        keep_every=cfg.keep_every,
        order=order_key(
            dataset.table,
            dataset.buckets,
            fps_max=dataset.fps_max,
            seed=cfg.seed,
            balance=balance.key if balance else None,
        ),
        about={"world_size": runtime.world_size, "booster": dict(cfg.booster), "dtype": cfg.dtype, "seed": cfg.seed},
        async_io=cfg.async_io,
        on_save_error=cfg.on_save_error,
    )


def make_schedule(cfg: RunConfig, dataset: ClipDataset, booster: Booster) -> Schedule:
    """Total steps from `steps`, or from `epochs` where every epoch has the same number of them.

    Raises:
        ValueError: an accumulation below 1, or a cosine schedule whose end cannot be known.
    """
    if cfg.accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={cfg.accumulation_steps} must be 1 or more")
    total = cfg.steps
    if total is None and has_constant_length(dataset.plan(0)):
        total = cfg.epochs * steps_in_epoch(len(dataset.plan(0)), booster.dp_size * cfg.accumulation_steps)
    if total is None and cfg.lr_schedule == "cosine":
        raise ValueError(
            "lr_schedule='cosine' needs the number of steps, which keep probabilities below 1 and buckets with fewer "
            "clips than a batch leave open; set --steps"
        )
    return Schedule(
        total_steps=total,
        epochs=cfg.epochs,
        accumulation_steps=cfg.accumulation_steps,
        warmup_steps=cfg.warmup_steps,
        lr_schedule=cfg.lr_schedule,
        log_every=cfg.log_every,
        ckpt_every=cfg.ckpt_every,
    )


def batches_from(
    cfg: RunConfig,
    runtime: Runtime,
    dataset: ClipDataset,
    plan_of: Callable[[int], EpochPlan],
    booster: Booster,
    state: TrainState,
) -> Iterator[Batch]:
    """This rank's batches from the state's position on, without end."""
    micro_batches = rank_stream(
        plan_of,
        Position(state.epoch, state.micro_batch),
        dp_rank=booster.dp_rank,
        dp_size=booster.dp_size,
        accumulation=cfg.accumulation_steps,
    )
    return make_loader(
        dataset,
        micro_batches,
        num_workers=cfg.num_workers,
        prefetch_factor=cfg.prefetch_factor,
        pin_memory=runtime.device.type == "cuda",
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
    cfg: RunConfig, runtime: Runtime, dataset: ClipDataset, model: Denoiser, schedule: Schedule, state: TrainState
) -> None:
    """One line each for data, model and schedule."""
    plan = dataset.plan(state.epoch)
    micro_per_step = runtime.world_size * cfg.accumulation_steps
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
