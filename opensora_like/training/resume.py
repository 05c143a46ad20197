"""Where a run begins: at nothing, at a checkpoint, or at the weights of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.adapters import check_scales
from opensora_like.checkpoint.facts import CONFIG_FILE, check_order
from opensora_like.checkpoint.lora_files import scale_of
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.weights import LoadReport, found_sources
from opensora_like.config import read_config
from opensora_like.datasets.plan import EpochPlan, steps_in_epoch
from opensora_like.runtime import found_by_main, logger
from opensora_like.settings import RunConfig


def with_found_sources(cfg: RunConfig) -> RunConfig:
    """`cfg` with the checkpoints in place of the runs that its weights are taken from, the same on all ranks.

    Raises:
        FileNotFoundError: nothing is there.
    """
    found: dict[str, Any] = {"model": found_sources(cfg.model, ["from_pretrained"], where="model.")}
    if cfg.lora_config is not None:
        found |= found_sources({"lora_checkpoint": cfg.lora_checkpoint}, ["lora_checkpoint"], where="")
    return replace(cfg, **found)


def load_state(cfg: RunConfig, folder: Path, checkpoints: CheckpointManager, *, micro_per_step: int) -> TrainState:
    """Load `cfg.load` into weights, optimizer and EMA. Returns: where the run stands.

    ``start_epoch`` and ``start_step`` keep all of that and move the data only.
    """
    if cfg.load is None:
        return TrainState()
    restart = cfg.start_epoch is not None or cfg.start_step is not None

    def load(source: Path) -> TrainState:
        if cfg.load_weights_only:
            log_report(f"weights of {source}", checkpoints.load_weights(source, strict=cfg.load_strict))
            check_frozen(cfg, source)
            return TrainState()
        check = None if restart else partial(check_order, order=checkpoints.order, folder=source)
        state = checkpoints.load(source, check=check)
        check_frozen(cfg, source)
        if restart:
            state.epoch, state.micro_batch = cfg.start_epoch or 0, (cfg.start_step or 0) * micro_per_step
        logger.info("loaded %s: step %d epoch %d micro_batch %d", source, state.step, state.epoch, state.micro_batch)
        return state

    if cfg.load == "latest":
        return checkpoints.newest_intact(load)
    return load(found_by_main(lambda: layout.find_checkpoint(cfg.load, folder)))


def check_frozen(cfg: RunConfig, source: Path) -> None:
    """Compare what the weights of a checkpoint stand on, where they are not all. Paths may change: those are told only.

    Raises:
        ValueError: adapters were trained with another scale.
    """
    if cfg.lora_config is None and cfg.trainable_modules is None:
        return
    was = read_config(source / CONFIG_FILE).config
    if cfg.lora_config is not None and was.lora_config is not None:
        check_scales({"all": scale_of(was.lora_config)}, cfg.lora_config, where=f"load={str(source)!r}")
    old, new = (settings.model.get("from_pretrained") for settings in (was, cfg))
    if old != new:
        logger.warning(
            "%s was trained on frozen weights of model.from_pretrained=%r, this run has %r; they have to be the same",
            *(source, old, new),
        )


def begin_with_a_whole_step(state: TrainState, plan_of: Callable[[int], EpochPlan], *, micro_per_step: int) -> None:
    """Move a position to the next epoch where what is left of its own fills no step, as steps were smaller before.

    The loader goes on there in any case; a run of `epochs` has to know that one has ended.
    """
    if state.micro_batch == 0:
        return
    length = len(plan_of(state.epoch))
    if state.micro_batch <= length and not steps_in_epoch(length, micro_per_step, state.micro_batch):
        state.epoch, state.micro_batch = state.epoch + 1, 0


def check_load(cfg: RunConfig, folder: Path) -> None:
    """Refuse settings that would be ignored and a checkpoint that is not there, before weights are made; on all ranks.

    Args:
        folder: of the run.

    Raises:
        ValueError: `load_weights_only`, `load_strict`, `start_epoch` or `start_step` where they mean nothing.
        FileNotFoundError: no complete checkpoint where `load` says.
    """
    restart = cfg.start_epoch is not None or cfg.start_step is not None
    if restart and cfg.load is None:
        raise ValueError("start_epoch and start_step move the data of a loaded checkpoint; give --load as well")
    if cfg.load_weights_only and cfg.load is None:
        raise ValueError("load_weights_only=True takes the weights of `load`; give --load as well")
    if cfg.load_weights_only and restart:
        raise ValueError("load_weights_only=True begins at the first step; remove start_epoch and start_step")
    if not cfg.load_strict and not cfg.load_weights_only:
        raise ValueError("load_strict=False is for weights alone; give --load-weights-only as well")
    if cfg.load is not None:
        found_by_main(lambda: layout.find_checkpoint(cfg.load, folder))


def log_report(where: str, report: LoadReport) -> None:
    """One line for all keys, and one for each that was not loaded."""
    logger.info("%s: %s", where, report)
    for line in report.lines():
        logger.warning("%s: %s", where, line)
