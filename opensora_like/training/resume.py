"""Where a run begins: at nothing, at a checkpoint, or at the weights of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import check_order
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.weights import LoadReport
from opensora_like.runtime import logger
from opensora_like.settings import RunConfig


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
            return TrainState()
        check = None if restart else partial(check_order, order=checkpoints.order, folder=source)
        state = checkpoints.load(source, check=check)
        if restart:
            state.epoch, state.micro_batch = cfg.start_epoch or 0, (cfg.start_step or 0) * micro_per_step
        logger.info("loaded %s: step %d epoch %d micro_batch %d", source, state.step, state.epoch, state.micro_batch)
        return state

    return checkpoints.newest_intact(load) if cfg.load == "latest" else load(layout.find_checkpoint(cfg.load, folder))


def check_load(cfg: RunConfig, folder: Path) -> None:
    """Refuse settings that would be ignored and a checkpoint that is not there, before weights are made.

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
        layout.find_checkpoint(cfg.load, folder)


def log_report(where: str, report: LoadReport) -> None:
    """One line for all keys, and one for each that was not loaded."""
    logger.info("%s: %s", where, report)
    for line in report.lines():
        logger.warning("%s: %s", where, line)
