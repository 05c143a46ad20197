"""Prepare a folder of videos in one process or many: encoders, the share of each, and what the folder is at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from opensora_like.datasets.latent_store import finish
from opensora_like.datasets.store_files import read_failures
from opensora_like.models.fingerprint import cache_fingerprint, latent_facts
from opensora_like.preparation.captions import Listing
from opensora_like.preparation.frames import FrameChoice, Picture
from opensora_like.preparation.sinks import TEXT, MetaSink, Sink, StoreSink, forget_failures
from opensora_like.preparation.verify import report, verify_clips
from opensora_like.preparation.videos import Counts, Recipe, prepare_clips
from opensora_like.registry import MODELS, build
from opensora_like.runtime import DTYPES, Runtime, logger

Output = Literal["store", "meta"]
_SHOWN = 5  # failures that are printed


@dataclass(frozen=True)
class Job:
    """What to prepare.

    Args:
        autoencoder, text_encoder: sections as in a config.
        stochastic: a store keeps the posterior's deviation beside its mean, so that every reading draws anew; `.meta`
            files keep one sample.
        verify: samples that are decoded and compared at the end, and shown in `verify_folder` if there is one.
    """

    video_folder: Path
    output_folder: Path
    output: Output
    listing: Listing
    frames: FrameChoice
    picture: Picture
    autoencoder: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    stochastic: bool = False
    seed: int = 42
    latents_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    read_ahead: int = 2
    verify: int = 0
    verify_folder: Path | None = None


def sections_of(
    model: str | None, *, autoencoder: str | None = None, text_encoder: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The autoencoder and the text encoder as a config names them.

    Args:
        model: folder of a published pipeline, or its name on the hub, of which these two parts are downloaded.
        autoencoder, text_encoder: folder or file of one of them, in place of that in `model`.

    Raises:
        ValueError: nothing says where one of them is.
        FileNotFoundError: a path that is not there, or the hub does not have the model or cannot be reached.
    """
    parts = (("autoencoder", autoencoder, ("vae",)), ("text_encoder", text_encoder, ("text_encoder", "tokenizer")))
    if lacking := [name for name, given, _ in parts if given is None and model is None]:
        raise ValueError(f"no model: give --model, or --{lacking[0]}")
    for name, given, _ in parts:
        if given is not None and not Path(given).exists():
            raise FileNotFoundError(f"{name}={given!r} is not there; correct the path")
    wanted = [folder for _, given, folders in parts if given is None for folder in folders]
    root = _fetch(model, wanted) if wanted else Path()
    vae = root / "vae" if (root / "vae").is_dir() else root  # as configs name it, who then find it to be the same
    return (
        {"type": "wan_vae", "from_pretrained": autoencoder or str(vae.absolute())},
        {"type": "umt5", "from_pretrained": text_encoder or str(root.absolute())},
    )


def _fetch(model: str, parts: list[str]) -> Path:
    """A folder as it is; of a name on the hub, the folder that these parts of it are downloaded to."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(f"model={model!r} is not a folder, and not a name on the hub (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[f"{part}/*" for part in parts]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as problem:
        raise FileNotFoundError(
            f"model={model!r} is not a folder, and the hub does not give it ({type(problem).__name__}); download it "
            "where there is a network, and give its folder"
        ) from problem


def build_recipe(job: Job, device: torch.device) -> tuple[Recipe, dict[str, Any]]:
    """The encoders, built and on the device, and the fingerprint of what they make.

    Raises:
        ValueError, FileNotFoundError, OSError: sections that do not fit, weights that are not there.
    """
    autoencoder = build(job.autoencoder, MODELS, where="autoencoder").to(device)
    text_encoder = build(job.text_encoder, MODELS, where=f"encoders.{TEXT}").to(device)
    posterior = ("std" if job.output == "store" else "sample") if job.stochastic else "mean"
    recipe = Recipe(
        job.video_folder,
        job.frames,
        job.picture,
        autoencoder,
        text_encoder,
        device,
        posterior,
        job.seed,
        DTYPES[job.latents_dtype],
    )
    encoders = cache_fingerprint(job.autoencoder, {TEXT: job.text_encoder}, facts=latent_facts(autoencoder))
    own = {"frames": asdict(job.frames), "picture": asdict(job.picture), "latents_dtype": job.latents_dtype}
    own |= {"posterior": posterior} | ({"seed": job.seed} if posterior == "sample" else {})
    return recipe, {**encoders, **own}


def open_sink(job: Job, fingerprint: Mapping[str, Any], *, rank: int, world_size: int) -> Sink:
    """This process' part of the output folder. Raises ValueError where it was made with other settings."""
    if job.output == "store":
        return StoreSink(job.output_folder, fingerprint=fingerprint, rank=rank, world_size=world_size)
    picture = job.picture
    facts = {
        "mode": job.frames.mode,
        "is_deterministic": not job.stochastic,
        "is_tiled": bool(job.autoencoder.get("use_tiling", False)),
        "resize": {
            "target_size": None if picture.height is None else (picture.height, picture.width),
            "resize_mode": picture.resize_mode,
            "maintain_aspect_ratio": picture.keep_aspect,
            "center_crop": picture.center_crop,
        },
    }
    folders = {"video_folder": job.video_folder}
    return MetaSink(job.output_folder, fingerprint=fingerprint, facts=facts, rank=rank, **folders)


def prepare(job: Job, recipe: Recipe, fingerprint: Mapping[str, Any], sink: Sink, runtime: Runtime) -> int:
    """Make this process' share, wait for the others, and finish the folder.

    Clips are dealt in turn: neighbours, which often have the same length, go to different processes.

    Args:
        sink: of this process, as `open_sink` gives it.

    Returns: the exit code, 1 where there is not one sample.
    """
    if runtime.is_main:
        forget_failures(job.output_folder)
        for note in job.listing.notes:
            logger.info("%s", note)
    _sum_over_ranks(Counts())
    share = job.listing.clips[runtime.rank :: runtime.world_size]
    try:
        counts = prepare_clips(share, recipe, sink, read_ahead=job.read_ahead)
    finally:
        sink.close()  # what was made stays made
    total = _sum_over_ranks(counts)
    if not runtime.is_main:
        return 0 if total.made + total.kept else 1
    if total.made + total.kept and job.output == "store":
        finish(job.output_folder)
    _tell(job, total)
    if job.verify and total.made + total.kept:
        again = open_sink(job, fingerprint, rank=0, world_size=1)  # which knows what the other processes made
        report(verify_clips(job.listing.clips, recipe, again, count=job.verify), folder=job.verify_folder)
        again.close()
    return 0 if total.made + total.kept else 1


def _sum_over_ranks(counts: Counts) -> Counts:
    """Over all processes; on the CPU, whatever the device, as a process may wait here for hours."""
    total = torch.tensor(counts)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return Counts(*total.tolist())


def _tell(job: Job, total: Counts) -> None:
    print(
        f"{job.output_folder}: {total.made} samples made, {total.kept} there already, {total.failed} clips failed, of "
        f"{len(job.listing.clips)} clips"
    )
    reasons = read_failures(job.output_folder)
    for failure in reasons[:_SHOWN]:
        print(f"  {failure['key']}: {failure['reason']}")
    if len(reasons) > _SHOWN:
        print(f"  and {len(reasons) - _SHOWN} more in {job.output_folder / 'failures.rank*.jsonl'}")
