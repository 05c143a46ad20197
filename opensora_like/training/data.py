"""The data side of a run: the dataset, the order of its micro-batches, and the batches of this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.manager import TrainState
from opensora_like.datasets.ahead import build_ahead
from opensora_like.datasets.balance import Balance, balance_plan, micro_batch_weight
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.batch import Batch
from opensora_like.datasets.cost import CostModel, Grid
from opensora_like.datasets.dealing import Dealing, make_dealt_loader
from opensora_like.datasets.loader import make_loader
from opensora_like.datasets.plan import EpochPlan, KeptPlans, Position, rank_stream
from opensora_like.datasets.shards import ShardedTable
from opensora_like.models.base import Autoencoder, TextEncoder
from opensora_like.models.stand_ins import CachedAutoencoder
from opensora_like.registry import DATASETS, build, fit_arguments
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.device_feed import DeviceFeed
from opensora_like.training.resources import derive_cost


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
        encoded_by = None if isinstance(autoencoder, CachedAutoencoder) else cfg.autoencoder
        cost = derive_cost(cfg.model, encoded_by, encoders, dataset.buckets)
        logger.info("cost %s", " ".join(f"{name} {value:.4g}" for name, value in vars(cost).items()))
    return Balance(cost.of_buckets(dataset.buckets, grid_of(autoencoder, dataset)), **options)


def grid_of(autoencoder: Autoencoder, dataset: ClipDataset) -> Grid:
    """How clips of this dataset become tokens."""
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
    """Epoch -> its plan, balanced; of a table in shards the next one is begun."""
    kept = KeptPlans()

    def build_one(epoch: int) -> EpochPlan:
        plan = dataset.plan(epoch)
        if isinstance(dataset.table, ShardedTable) and runtime.local_rank == 0:
            build_ahead(dataset.table, dataset.buckets, fps_max=dataset.fps_max, seed=cfg.seed, epoch=epoch + 1)
        return plan if balance is None else balance_plan(plan, balance, seed=cfg.seed)

    return lambda epoch: kept.get(epoch, lambda: build_one(epoch))


def batches_from(
    cfg: RunConfig,
    runtime: Runtime,
    dataset: ClipDataset,
    plan_of: Callable[[int], EpochPlan],
    booster: Booster,
    state: TrainState,
    *,
    dealing: Dealing | None = None,
) -> Iterator[Batch]:
    """This rank's batches from the state's position on, without end; with `dealing`, the pixels of its samples only."""
    micro_batches = rank_stream(
        plan_of,
        Position(state.epoch, state.micro_batch),
        dp_rank=booster.dp_rank,
        dp_size=booster.dp_size,
        accumulation=cfg.accumulation_steps,
    )
    on_gpu = runtime.device.type == "cuda"
    make = make_loader if dealing is None else partial(make_dealt_loader, dealing=dealing)
    batches = make(
        dataset,
        micro_batches,
        num_workers=cfg.num_workers,
        prefetch_factor=cfg.prefetch_factor,
        pin_memory=on_gpu if cfg.pin_memory is None else cfg.pin_memory,
    )
    ahead = on_gpu if cfg.device_prefetch is None else cfg.device_prefetch
    return DeviceFeed(batches, runtime.device) if ahead else batches
