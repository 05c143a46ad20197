"""Samples the prompts of a prepared dataset with the weights of a checkpoint, in one process or in many."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

import opensora_like
from opensora_like import runtime as rt
from opensora_like.checkpoint.files import write_text
from opensora_like.config import config_text, read_config, to_dict
from opensora_like.evaluation.cached_text import CachedPrompts, KnownTexts, read_cached_prompts
from opensora_like.evaluation.find_weights import FoundWeights, config_beside, find_weights, join_shards
from opensora_like.evaluation.generate import Frozen, VideoGenerator
from opensora_like.evaluation.prompts import Job, Prompt, jobs_of, read_prompts
from opensora_like.evaluation.report import write_report
from opensora_like.evaluation.sampling import save_samples, with_found_sources
from opensora_like.evaluation.speech import with_sound
from opensora_like.evaluation.validation_report import SampleFile, VideoSheet
from opensora_like.registry import MODELS, build
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import InferenceConfig, RunConfig

USAGE = """Sample the prompts of a prepared dataset with the weights of a checkpoint.

python scripts/diffusion/validate.py [CONFIG] --meta_folder FOLDER [--checkpoint PATH | RUN/LATEST] [--num_samples N]
    [--guidance_scale 5] [--num_inference_steps 50] [--height 480] [--width 832] [--num_frames 81] [--fps 16]
    [--seed 42] [--output_dir ./validation_outputs] [--model_id FOLDER of a published pipeline]
    [--key value of an inference config]
"""
# flags of the published script -> settings of an inference config
PUBLISHED = {
    "guidance_scale": "guidance",
    "num_inference_steps": "num_steps",
    "fps": "fps_save",
    "output_dir": "save_dir",
}
OWN = ("meta_folder", "checkpoint", "num_samples", "model_id")
# setting -> what of the folder of a published pipeline (--model_id) it takes
PARTS = {"model": "transformer", "autoencoder": "vae", "encoders.text": "."}
DEFAULT_CONFIG = "configs/diffusion/inference/wan2_1_t2v_1_3b.py"  # its values are the published script's
OF_THE_RUN = ("model", "autoencoder", "encoders", "scheduler", "dtype", "custom_imports")
NOT_READ = ("prompt", "prompts", "start_index", "end_index", "refine_prompt", "ref", "first_image", "sp_size")
RESULTS_FILE, TABLE_FILE, PAGE_FILE = "validation.json", "validation.csv", "validation.html"


@dataclass(frozen=True)
class Request:
    """A command line that was read.

    Args:
        prompts: a store of latents, a folder of ``.meta`` files, or a csv with a column `text`.
        weights: None samples the published weights of the config.
        num_samples: prompts, from the first; None takes all.
    """

    config: InferenceConfig
    prompts: str
    weights: FoundWeights | None
    num_samples: int | None


def read_request(arguments: Sequence[str]) -> Request:
    """Read ``[CONFIG] --meta_folder FOLDER [--checkpoint PATH] [...]``.

    Without CONFIG, a checkpoint of this program brings its own models, and everything else is as the published script
    has it: Wan 2.1 1.3B, 81 frames at 480x832.

    Raises:
        ValueError: a flag that is missing or unknown, or settings that do not fit.
        FileNotFoundError: no such checkpoint; the message says what was looked for.

    Source: the flags of NVIDIA-NeMo/DFM:examples/automodel/generate/wan_validate.py.
    """
    words = list(arguments)
    path = words.pop(0) if words and not words[0].startswith("-") else None
    own, rest = _take_own(words)
    if "meta_folder" not in own:
        raise ValueError("--meta_folder is missing: a prepared folder, or a csv of prompts with a column 'text'")
    weights = find_weights(own["checkpoint"]) if "checkpoint" in own else None
    if path is not None:
        config = read_config(path, rest, schema=InferenceConfig).config
    else:
        config = _without_config(weights, rest)
    defaults = {f.name: f.default for f in dataclasses.fields(InferenceConfig)}
    for name in NOT_READ:
        if (value := getattr(config, name)) != defaults[name]:
            raise ValueError(f"{name}={value!r} is not read here; remove it, or use scripts/diffusion/inference.py")
    if weights is not None and (config.ckpt_path or config.lora_checkpoint):
        raise ValueError(
            f"--checkpoint {own['checkpoint']} and ckpt_path={config.ckpt_path!r}, "
            f"lora_checkpoint={config.lora_checkpoint!r}: both name weights; keep one"
        )
    num_samples = own.get("num_samples")
    if num_samples is not None and (not num_samples.isdigit() or int(num_samples) < 1):
        raise ValueError(f"--num_samples {num_samples} must be a number of prompts, 1 or more")
    return Request(config, own["meta_folder"], weights, None if num_samples is None else int(num_samples))


def _take_own(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This script's flags, and the others in our spelling."""
    own: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        key, sep, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--"):
            rest.append(word)
        elif key in OWN:
            if not sep:
                if not left or left[0].startswith("--"):
                    raise ValueError(f"--{key} needs a value")
                value = left.pop(0)
            own[key] = value
            if key == "model_id":
                rest += [f"--{section}.from_pretrained={Path(value) / part}" for section, part in PARTS.items()]
        else:
            rest.append(f"--{PUBLISHED[key]}{sep}{value}" if key in PUBLISHED else word)
    return own, rest


def _without_config(weights: FoundWeights | None, arguments: Sequence[str]) -> InferenceConfig:
    default = Path(opensora_like.__file__).parents[1] / DEFAULT_CONFIG
    saved = config_beside(weights) if weights is not None else None
    values = to_dict(read_config(default, schema=InferenceConfig).config)
    values["save_dir"] = "validation_outputs"
    if saved is not None:
        trained = to_dict(read_config(saved, schema=RunConfig).config)
        values |= {name: trained[name] for name in OF_THE_RUN}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.py"
        file.write_text(config_text(InferenceConfig(**values)))
        return read_config(file, arguments, schema=InferenceConfig).config


def build_validation(request: Request, runtime: Runtime) -> Callable[[], None]:
    """Read the prompts and load the weights. Returns: the rest of the work, sampling and writing.

    Raises:
        ValueError, FileNotFoundError: prompts or weights that are not there or do not fit.
    """
    request = _agreed(request)
    cached, jobs = _read_jobs(request)
    mine = jobs[runtime.rank :: runtime.world_size]
    generator = None
    with ExitStack() as unfinished:
        cfg = with_found_sources(_with_weights(request, runtime, unfinished))
        if mine:
            frozen = None if cached is None else _cached_frozen(cfg, cached, runtime)
            generator = VideoGenerator(cfg, runtime.device, frozen=frozen)
        finished = unfinished.pop_all()
    patient = rt.patient_group()  # a rank may have a video more than another, which has none at all

    def work() -> None:
        with finished:
            files = save_samples(generator, mine) if generator is not None else []
            rows = [
                {"name": job.prompt.name, "text": job.prompt.text, "file": file.name, "seed": cfg.seed + job.repeat}
                for job, file in zip(mine, files, strict=True)
            ]
            everyone: list[Any] = [None] * runtime.world_size
            dist.all_gather_object(everyone, rows, group=patient)
        if runtime.is_main:
            order = {job.stem: number for number, job in enumerate(jobs)}
            joined = sorted((row for found in everyone for row in found), key=lambda row: order[Path(row["file"]).stem])
            _write_results(request, cfg, joined)

    return work


def _agreed(request: Request) -> Request:
    """With the weights that rank 0 found: a run that goes on may have published others before the next one looked."""
    if request.weights is None:
        return request
    kind, path, step, is_own = json.loads(rt.broadcast_text(json.dumps(request.weights, default=str)))
    return dataclasses.replace(request, weights=FoundWeights(kind, Path(path), step, is_own))


def _read_jobs(request: Request) -> tuple[CachedPrompts | None, list[Job]]:
    cfg, source = request.config, Path(request.prompts)
    if source.suffix == ".csv":
        cached, asked = None, dataclasses.replace(cfg, prompt=None, prompts=request.prompts)
        prompts = [with_sound(prompt, asked) for prompt in read_prompts(asked)]
    else:
        cached = read_cached_prompts(source)
        if cfg.fps_in_caption or cfg.motion_score is not None:
            raise ValueError(
                f"fps_in_caption={cfg.fps_in_caption!r}, motion_score={cfg.motion_score!r}: the embeddings of "
                f"{request.prompts!r} were made from its own texts; use --fps_in_caption False --motion_score none"
            )
        prompts = [
            Prompt(number, prompt.text, prompt.name, cfg.negative_prompt, (), seen)
            for number, (prompt, seen) in enumerate(zip(cached.prompts, _occurrences(cached), strict=True))
        ]
    return cached, jobs_of(prompts[: request.num_samples], cfg.num_sample)


def _occurrences(cached: CachedPrompts) -> list[int]:
    """How many earlier prompts have the text of each."""
    seen: Counter[str] = Counter()
    counts = []
    for prompt in cached.prompts:
        counts.append(seen[prompt.text])
        seen[prompt.text] += 1
    return counts


def _with_weights(request: Request, runtime: Runtime, at_the_end: ExitStack) -> InferenceConfig:
    """The config with what was found in the place of weights; the same on every process.

    Args:
        at_the_end: removes the file that sharded weights are joined in.
    """
    cfg, weights = request.config, request.weights
    if weights is None:
        return cfg
    logger.info("checkpoint: %s", weights)
    if weights.is_own:
        if read_config(config_beside(weights), schema=RunConfig).config.lora_config is not None:
            return dataclasses.replace(cfg, lora_checkpoint=str(weights.path), use_ema=weights.kind == "ema")
        return dataclasses.replace(cfg, ckpt_path=str(weights.path), use_ema=weights.kind == "ema")
    path = weights.path
    if weights.kind == "sharded":
        # a name of its own: another command may be sampling other weights into the same folder
        path = Path(cfg.save_dir) / f".joined-{rt.broadcast_text(secrets.token_hex(4))}.pt"
        problem = ""
        if runtime.is_main:
            at_the_end.callback(path.unlink, missing_ok=True)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                join_shards(weights.path, path)
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := rt.broadcast_text(problem):
            raise ValueError(problem)
    return dataclasses.replace(cfg, ckpt_path=str(path))


def _cached_frozen(cfg: InferenceConfig, cached: CachedPrompts, runtime: Runtime) -> Frozen:
    """The autoencoder, and cached embeddings in the place of the encoders."""
    readers = {prompt.text: prompt.read for prompt in cached.prompts}

    def builder(name: str) -> Callable[[], Any]:
        return lambda: build(cfg.encoders[name], MODELS, where=f"encoders.{name}").eval().to(runtime.device)

    encoders = {
        name: KnownTexts(name, readers, null=cached.null.get(name), build=builder(name), device=runtime.device)
        for name in cfg.encoders
    }
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder").requires_grad_(False).eval()
    return Frozen(autoencoder.to("cpu" if cfg.offload else runtime.device), encoders)


def _write_results(request: Request, cfg: InferenceConfig, rows: Sequence[dict[str, Any]]) -> None:
    """What was made with which weights, for programs, for tables and for people."""
    folder, weights = Path(cfg.save_dir), request.weights
    kind = "base" if weights is None else weights.kind
    source = cfg.model.get("from_pretrained") if weights is None else str(weights.path)
    made_with = {"kind": kind, "path": source, "step": None if weights is None else weights.step}
    write_text(
        folder / RESULTS_FILE,
        json.dumps(
            {"weights": made_with, "prompts": request.prompts, "settings": to_dict(cfg), "samples": list(rows)},
            indent=1,
            ensure_ascii=False,
            default=str,
        ),
    )
    table = io.StringIO()
    writer = csv.DictWriter(table, ["path", "text", "name", "seed", "weights"])
    writer.writeheader()
    for row in rows:
        writer.writerow({"path": row["file"], "weights": kind, **{k: row[k] for k in ("text", "name", "seed")}})
    write_text(folder / TABLE_FILE, table.getvalue())
    label = "ema" if kind == "ema" else "base" if weights is None else "raw"
    step = made_with["step"] or 0
    files = [SampleFile(step, label, Path(row["file"]).stem, row["text"], row["file"]) for row in rows]
    summary = {"weights": kind, "step": made_with["step"], "prompts": request.prompts, "samples": len(rows)}
    write_report(folder / PAGE_FILE, title=f"validation of {source}", summary=summary, sections=[VideoSheet(files)])
    logger.info("%d samples of %s weights in %s", len(rows), kind, folder)
