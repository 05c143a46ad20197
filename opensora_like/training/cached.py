"""Training from a store of latents and embeddings: what need not be built, and whether the store fits the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from opensora_like.conditioning.masks import references_of
from opensora_like.conditioning.wan_i2v import takes_grey_clips
from opensora_like.datasets.latent_store import LatentStore, check_fingerprint, open_store
from opensora_like.models.base import Autoencoder, TextEncoder, encoders_of
from opensora_like.models.fingerprint import encoder_fingerprint
from opensora_like.models.stand_ins import CachedAutoencoder, CachedText
from opensora_like.registry import MODELS, resolve
from opensora_like.settings import RunConfig
from opensora_like.training.measure import build_on_meta

KIND = "latents"  # the type of the dataset


@dataclass(frozen=True)
class Cached:
    """Stand-ins for the encoders that a store replaces. Args: encoders: by condition name, those that were cached."""

    autoencoder: Autoencoder
    encoders: Mapping[str, TextEncoder]


def open_cached(cfg: RunConfig) -> Cached | None:
    """The stand-ins of a run on cached latents, after a comparison of the store with the config; None for other runs.

    Raises:
        FileNotFoundError: no such store, or weights that the config names.
        ValueError: the store was made with other encoders, or lacks what the config asks for.
    """
    if cfg.dataset.get("type") != KIND or "cache_path" not in cfg.dataset:
        return None  # a missing key is an error of the dataset
    store = open_store(cfg.dataset["cache_path"])
    cached = cached_encoders(cfg, store)
    _check_encoders(cfg, store, cached)
    _check_settings(cfg, store)
    if missing := [name for name in cached if name not in store.null]:
        raise ValueError(
            f"store {str(store.folder)!r} has embeddings of {missing} and not of the empty caption; cache again with "
            "tools/cache_latents.py, which keeps them"
        )
    texts = {name: CachedText(name, store.null[name]) for name in cached}
    return Cached(CachedAutoencoder(store.fingerprint["latents"]), texts)


def cached_encoders(cfg: RunConfig, store: LatentStore) -> list[str]:
    """Names of the encoders of a run whose embeddings `store` has."""
    return [name for name in cfg.encoders if f"embeddings.{name}" in store.tensor_names()]


def check_no_pixels_needed(cfg: RunConfig) -> None:
    """Refuse what encodes pixels that depend on the task of a sample, which is drawn anew in every epoch.

    Raises:
        ValueError: published Wan i2v conditions, or an encoder of images.
    """
    classes = {name: resolve(section.get("type"), MODELS) for name, section in cfg.encoders.items()}
    if pictures := encoders_of("image", classes) + encoders_of("captioned image", classes):
        raise ValueError(
            f"encoders.{pictures[0]} encodes given frames, which are not cached; train with a dataset that reads videos"
        )
    if sounds := encoders_of("audio", classes):
        raise ValueError(
            f"encoders.{sounds[0]} encodes sound, which is not cached; train with dataset.type='video_speech'"
        )
    model = build_on_meta(cfg.model, where="model")
    if "visual" in model.condition_names and takes_grey_clips(model):
        raise ValueError(
            "model.ungiven='grey' encodes clips that are grey but for the given frames, which are not cached; train "
            "with a dataset that reads videos, or set model.ungiven='zero'"
        )


def _check_encoders(cfg: RunConfig, store: LatentStore, cached: list[str]) -> None:
    """Rank 0 looks at the weights, the others take its word: they may be large and on a shared disk."""
    problem: list[Exception | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            wanted = {
                "autoencoder": encoder_fingerprint(cfg.autoencoder, where="autoencoder"),
                "encoders": {n: encoder_fingerprint(cfg.encoders[n], where=f"encoders.{n}") for n in cached},
            }
            found = {name: store.fingerprint.get(name, {}) for name in ("autoencoder", "encoders")}
            found["encoders"] = {name: found["encoders"].get(name, {}) for name in cached}
            check_fingerprint(store.folder, found, wanted)
        except (ValueError, OSError) as found_problem:
            problem = [found_problem]
    if dist.is_initialized():
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


def _check_settings(cfg: RunConfig, store: LatentStore) -> None:
    """Refuse what the store cannot give before a step is made."""
    check_no_pixels_needed(cfg)
    facts = store.fingerprint["latents"]
    if cfg.sample_posterior and facts["has_deviation"] and "latents_std" not in store.tensor_names():
        raise ValueError(
            f"sample_posterior=True needs the deviation of the latents, and store {str(store.folder)!r} has their "
            "mean only; set sample_posterior=False, or cache with sample_posterior=True"
        )
    needed = references_of(cfg.condition_config, is_causal=facts["is_causal"])
    have = [n.removeprefix("references.") for n in store.tensor_names() if n.startswith("references.")]
    if missing := sorted(set(needed) - set(store.fingerprint.get("references", have))):
        raise ValueError(
            f"condition_config={dict(cfg.condition_config)!r} needs latents of given frames ({missing}), store "
            f"{str(store.folder)!r} has those of {have}; cache with this condition_config, or train t2v only"
        )
    if needed and "data_path" not in cfg.dataset:
        raise ValueError(
            f"condition_config={dict(cfg.condition_config)!r} needs latents of given frames, which a store without "
            "dataset.data_path does not have for windows of its entries; name the table, or train t2v only"
        )
