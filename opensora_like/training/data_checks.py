"""Whether a run has data at all, and what of its bucket config its models cannot take; before anything is trained."""

from __future__ import annotations

from typing import NamedTuple

from opensora_like.boosters.base import Booster
from opensora_like.conditioning.encode import check_conditions
from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.bucket import Buckets
from opensora_like.datasets.cost import Grid
from opensora_like.datasets.diagnosis import Steps
from opensora_like.datasets.plan import Position, check_long_enough, steps_in_epoch
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.registry import MODELS, resolve
from opensora_like.runtime import Runtime
from opensora_like.settings import RunConfig
from opensora_like.training.batch_size import ranks_per_sample, with_batch_sizes
from opensora_like.training.cached import Cached
from opensora_like.training.data import build_dataset
from opensora_like.training.held_out_loss import hold_out
from opensora_like.training.measure import build_on_meta
from opensora_like.training.trainable import choose_trainable


class Outline(NamedTuple):
    """Models of a run that tell sizes and conditions, without memory for their weights."""

    model: Denoiser
    autoencoder: Autoencoder


def build_outline(cfg: RunConfig, cached: Cached | None) -> Outline:
    """Nothing is read or drawn for it. Args: cached: as `open_cached` gives it."""
    model = build_on_meta(cfg.model, where="model")
    choose_trainable(cfg, model)
    return Outline(model, build_on_meta(cfg.autoencoder, where="autoencoder") if cached is None else cached.autoencoder)


def build_checked_dataset(cfg: RunConfig, runtime: Runtime, booster: Booster, outline: Outline) -> ClipDataset:
    """The run's dataset, once data and settings were found to fit each other: before minutes are spent on weights.

    Raises:
        ValueError: as `check_data` and `check_conditions`; settings of loading that need a GPU where there is none.
        FileNotFoundError: no such table.
    """
    for name in ("pin_memory", "device_prefetch"):
        if getattr(cfg, name) and runtime.device.type != "cuda":
            raise ValueError(f"{name}=True needs a GPU, and the device is {runtime.device}; remove it")
    encoders = {name: resolve(c.get("type"), MODELS, where=f"encoders.{name}") for name, c in cfg.encoders.items()}
    settings = {"dropout_ratio": cfg.dropout_ratio, "condition_config": cfg.condition_config}
    check_conditions(outline.model, outline.autoencoder, encoders, **settings)
    dataset = build_dataset(cfg, multiple=outline.autoencoder.spatial_stride * outline.model.patch_size)
    hold_out(cfg, dataset)
    sizes = {"dp_size": booster.dp_size, "accumulation": cfg.accumulation_steps}
    check_data(dataset, outline.autoencoder, **sizes, with_plan=cfg.load is None or cfg.steps is None)
    return dataset


def bucket_errors(buckets: Buckets, autoencoder: Autoencoder) -> list[str]:
    """One line per frame count of the bucket config that the autoencoder refuses, each beginning with its key."""
    found: dict[str, str] = {}
    for bucket, shape in enumerate(buckets.shapes):
        key = f"bucket_config.{shape.resolution}.{shape.num_frames}"
        if key in found:
            continue
        try:
            autoencoder.latent_shape(shape.num_frames, shape.height, shape.width)
        except ValueError as problem:
            found[key] = f"{key} (ratio {buckets.ratios[bucket]}): {problem}"
    return list(found.values())


def bucket_notes(buckets: Buckets, autoencoder: Autoencoder, grid: Grid, *, sp_size: int) -> list[str]:
    """What works and costs something: frames that a causal autoencoder drops, tokens that ranks cannot share evenly.

    Args:
        sp_size: ranks that share the tokens of a sample.
    """
    notes = []
    stride = autoencoder.temporal_stride
    if autoencoder.is_causal and stride > 1:
        counts = {s.num_frames for s in buckets.shapes if (s.num_frames - 1) % stride}
        for frames in sorted(counts):
            below = frames - (frames - 1) % stride
            rule = f"{frames} frames are not {stride} * k + 1, and the autoencoder is causal"
            notes.append(f"{rule}: use {below} or {below + stride}")
    tokens = [grid.tokens(shape) for shape in buckets.shapes]
    if uneven := [bucket for bucket, count in enumerate(tokens) if count % sp_size]:
        notes.append(
            f"sp_size={sp_size} does not divide the image tokens of {len(uneven)} buckets of one ratio, first "
            f"{buckets.name(uneven[0])} with {tokens[uneven[0]]}: the ranks of a sample differ by one token"
        )
    fewest = min(range(len(tokens)), key=tokens.__getitem__)
    if tokens[fewest] < sp_size:
        name = buckets.name(fewest)
        notes.append(f"{name} has {tokens[fewest]} image tokens for sp_size={sp_size} ranks: some have nothing to do")
    return notes


def check_data(
    dataset: ClipDataset, autoencoder: Autoencoder, *, dp_size: int, accumulation: int, with_plan: bool
) -> None:
    """Refuse a run that would see nothing, or whose autoencoder would stop it at its first batch of some bucket.

    Args:
        dp_size: ranks that read different samples.
        with_plan: lay out epoch 0 as well, which a run that is resumed elsewhere has no use for.

    Raises:
        ValueError: buckets that cannot be coded, no micro-batch, or too few of them for one step; with the numbers to
            change.
    """
    if errors := bucket_errors(dataset.buckets, autoencoder):
        raise ValueError("the autoencoder cannot code these buckets:\n" + "\n".join(errors))
    if with_plan:
        check_long_enough(dataset.plan(0), Position(0, 0), dp_size=dp_size, accumulation=accumulation)


def steps_of(cfg: RunConfig, world: int, num_micro_batches: int) -> Steps:
    """How an epoch of so many micro-batches is dealt to `world` processes."""
    split = ranks_per_sample(cfg.booster)
    if world < 1 or world % split:
        problem = f"{world} processes do not divide into groups of {split} that share a sample"
        return Steps(world, 0, 0, 0, num_micro_batches, problem)
    try:
        accumulation = with_batch_sizes(cfg, world).accumulation_steps
    except ValueError as problem:
        return Steps(world, world // split, 0, 0, num_micro_batches, str(problem))
    taken = world // split * accumulation
    steps = steps_in_epoch(num_micro_batches, taken)
    problem = "" if steps else f"{num_micro_batches} micro-batches, and a step of {world} processes takes {taken}"
    return Steps(world, world // split, accumulation, steps, num_micro_batches - steps * taken, problem)
