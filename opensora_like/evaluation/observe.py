"""Makes something of what is seen of a run while it trains: statistics, sample videos, one page that is kept up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.files import write_text
from opensora_like.config import config_text
from opensora_like.datasets.held_out import MeasuredLosses
from opensora_like.evaluation.cached_text import KnownTexts
from opensora_like.evaluation.generate import Frozen, Loaded, VideoGenerator
from opensora_like.evaluation.paired_loss import Interval, LossSummary, summarize, summarize_pairs
from opensora_like.evaluation.prompts import Prompt, caption_of, jobs_of, read_prompts, split_references
from opensora_like.evaluation.report import write_report
from opensora_like.evaluation.sampling import write_sampled
from opensora_like.evaluation.speech import with_sound
from opensora_like.evaluation.validation_report import (
    Row,
    SampleFile,
    ValidationSection,
    VideoSheet,
    plain_interval,
    row_of,
)
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.models.stand_ins import CachedAutoencoder, CachedText
from opensora_like.registry import MODELS, build, fit_arguments
from opensora_like.runtime import JsonlWriter, Runtime, logger
from opensora_like.settings import InferenceConfig, RunConfig

ROWS_FILE, REPORT_FILE, SAMPLES, SAMPLES_FILE = "validation.jsonl", "report.html", "samples", "samples.json"
# settings of a sampling run that a run that trains decides
DECIDED = ("model", "autoencoder", "encoders", "scheduler", "dtype", "custom_imports")
MEANINGLESS = (
    *("ckpt_path", "use_ema", "lora_checkpoint", "lora_scale"),
    *("offload", "save_dir", "overwrite", "sp_size", "sp_mode"),
)


class Watched(Protocol):
    """What is needed of the run; see training/validation.py."""

    cfg: RunConfig
    runtime: Runtime
    folder: Path
    model: Denoiser
    forward: nn.Module
    autoencoder: Autoencoder
    encoders: Mapping[str, TextEncoder]
    booster: Booster


class RunObserver:
    """Writes ``validation.jsonl``, ``samples/step*/`` and ``report.html`` into the run's folder.

    Videos are sampled with the booster's wrapped model, on all ranks: sharded weights stay sharded. Each prompt is
    sampled alone, so that its video does not depend on the number of processes.

    Raises:
        ValueError, FileNotFoundError: settings of `sampling` that do not fit, or no such csv.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._folder = watched.folder
        self._rows_file: JsonlWriter | None = None
        self._prompts: list[Prompt] = []
        self._generator: VideoGenerator | None = None
        if watched.cfg.sample_every:
            cfg, self._prompts = read_sampling(watched.cfg)
            self._generator = VideoGenerator(
                cfg,
                watched.runtime.device,
                frozen=_frozen(watched, cfg, self._prompts),
                denoiser=Loaded(watched.model, watched.forward),
            )
        dp_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(dp_ranks, watched.booster.dp_rank)
        self._speaks = dp_ranks.index(watched.booster.dp_rank) == dist.get_rank()  # once for ranks of one dp_rank

    def resume(self, step: int, *, is_new: bool) -> None:
        """Forget the rows of later steps, or all of them where other clips are measured now, and later samples."""
        for file in (self._folder / SAMPLES).glob(f"step*/{SAMPLES_FILE}"):
            if int(file.parent.name.removeprefix("step")) > step:
                file.unlink()  # the videos are made again under their names, or stay unlisted
        self._rows_file = JsonlWriter(self._folder / ROWS_FILE, resume_step=-1 if is_new else step)

    def measured(self, seen: MeasuredLosses) -> dict[str, float]:
        """Write a row. Returns: the means, for the metric writers."""
        loss = summarize(seen.losses_NK, seen.buckets)
        if seen.weights == "base":
            difference = None
        else:
            difference = summarize_pairs(seen.losses_NK, seen.base_NK, seen.buckets)
            if not (self._folder / ROWS_FILE).stat().st_size:  # validation was turned on after the beginning
                self._write_row(0, "base", seen.edges, summarize(seen.base_NK, seen.buckets), None)
        self._write_row(seen.step, seen.weights, seen.edges, loss, difference)
        suffix = "_ema" if seen.weights == "ema" else ""
        numbers = {f"val_loss{suffix}": loss.overall.mean}
        said = f"validation step {seen.step} weights {seen.weights} loss {plain_interval(loss.overall)}"
        if difference is not None:
            numbers[f"val_difference{suffix}"] = difference.overall.mean
            said += f" difference {plain_interval(difference.overall, is_difference=True)}"
        logger.info("%s", said)
        return numbers

    def _write_row(
        self, step: int, weights: str, edges: list[float], loss: LossSummary, difference: LossSummary | None
    ) -> None:
        assert self._rows_file is not None
        plain = None if difference is None else difference.to_json()
        row = {"weights": weights, "edges": edges, "loss": loss.to_json(), "difference": plain}
        self._rows_file.write(step, row)

    def sample(self, step: int, weights: str) -> None:
        """Sample every prompt; ranks take turns, all make equally many forwards, the spare ones write nothing."""
        assert self._generator is not None
        booster, folder = self._watched.booster, self._folder / SAMPLES / f"step{step:08d}"
        cfg = replace(self._generator.cfg, save_dir=str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(self._prompts), booster.dp_size):
            number = first + booster.dp_rank
            prompt = self._prompts[min(number, len(self._prompts) - 1)]
            for sampled in self._generator.sample_jobs(jobs_of([prompt], cfg.num_sample)):
                if number < len(self._prompts) and self._speaks:
                    write_sampled(cfg, sampled)
        dist.barrier()
        if self._watched.runtime.is_main:
            suffix = ".png" if cfg.num_frames == 1 else ".mp4"
            files = [
                {
                    "step": step,
                    "weights": weights,
                    "name": job.stem,
                    "caption": job.prompt.text,
                    "file": job.stem + suffix,
                }
                for job in jobs_of(self._prompts, cfg.num_sample)
            ]
            write_text(folder / SAMPLES_FILE, json.dumps(files, indent=1))

    def report(self, step: int) -> None:
        """Write the page anew."""
        cfg = self._watched.cfg
        rows = [json.loads(line) for line in (self._folder / ROWS_FILE).read_text().splitlines()]
        parsed = [row_of(row) for row in rows]
        sections: list[Any] = [ValidationSection(parsed, rows[-1]["edges"])] if rows else []
        if files := read_samples(self._folder, step):
            sections.append(VideoSheet(files))
        metrics = self._folder / "metrics.jsonl"
        write_report(
            self._folder / REPORT_FILE,
            title=self._folder.name,
            summary=_summary(cfg, step, parsed),
            metrics_jsonl=metrics if metrics.exists() else None,
            sections=sections,
            config=config_text(cfg),
        )


def _frozen(watched: Watched, cfg: InferenceConfig, prompts: Sequence[Prompt]) -> Frozen:
    """Autoencoder and encoders of the run. Where it trains on what was cached it has none: then the autoencoder is
    built, and the prompts are encoded now, by an encoder that does not stay."""
    device, autoencoder, encoders = watched.runtime.device, watched.autoencoder, dict(watched.encoders)
    if isinstance(autoencoder, CachedAutoencoder):
        autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder").requires_grad_(False).eval().to(device)
    texts = [text for prompt in prompts for text in (caption_of(prompt, cfg), prompt.negative)]
    for name in [name for name, encoder in encoders.items() if isinstance(encoder, CachedText)]:

        def make(name: str = name) -> TextEncoder:
            return build(cfg.encoders[name], MODELS, where=f"encoders.{name}").eval().to(device)

        encoders[name] = KnownTexts(name, {}, null=encoders[name].null[0], build=make, device=device)
        encoders[name].encode(texts)
    return Frozen(autoencoder, encoders)


def _summary(cfg: RunConfig, step: int, rows: Sequence[Row]) -> dict[str, Any]:
    newest = {row.weights: row for row in rows}
    found: dict[str, Any] = {"step": f"{step} of {cfg.steps}" if cfg.steps else step, "model": cfg.model["type"]}
    for kind, name in (("base", "loss at the beginning"), ("raw", "loss"), ("ema", "loss of the EMA")):
        if kind in newest:
            found[f"held-out {name}"] = _half(newest[kind].loss.overall)
    best = newest.get("ema", newest.get("raw"))
    if best is not None and best.difference is not None:
        found["difference from the beginning"] = _half(best.difference.overall, "+")
    return found


def _half(interval: Interval, sign: str = "") -> str:
    """The mean and half the width of its interval."""
    if interval.high != interval.high:  # of one clip
        return f"{interval.mean:{sign}.4g}"
    return f"{interval.mean:{sign}.4g} \N{PLUS-MINUS SIGN} {interval.high - interval.mean:.2g}"


def read_samples(folder: Path, step: int) -> list[SampleFile]:
    """What was sampled of a run up to `step`, by prompt and step."""
    found = []
    for file in sorted((folder / SAMPLES).glob(f"step*/{SAMPLES_FILE}")):
        for row in json.loads(file.read_text()):
            if row["step"] <= step:
                path = f"{SAMPLES}/{file.parent.name}/{row.pop('file')}"
                found.append(SampleFile(**row, path=path))
    return found


def read_sampling(cfg: RunConfig) -> tuple[InferenceConfig, list[Prompt]]:
    """The section `sampling` as the settings of a sampling run, and its prompts.

    Raises:
        ValueError: an unknown setting, one that the run decides, or no prompts.
        FileNotFoundError: no such csv.
    """
    section = dict(cfg.sampling)
    if refused := [name for name in (*DECIDED, *MEANINGLESS) if name in section]:
        raise ValueError(f"sampling.{refused[0]} is decided by the run that trains; remove it")
    texts = section.pop("prompts", None)
    if not texts:
        raise ValueError("sampling.prompts is missing; give a list of texts, or a csv with a column 'text'")
    if isinstance(texts, str):
        section["prompts"] = texts
    given = {name: getattr(cfg, name) for name in DECIDED}
    arguments = fit_arguments(InferenceConfig, {"type": "sampling", **section}, where="sampling", given=given)
    sampling = InferenceConfig(**{name: arguments.get(name, value) for name, value in {**given, **arguments}.items()})
    if isinstance(texts, str):
        prompts = read_prompts(sampling)
    else:
        if unread := [name for name in ("prompt", "start_index", "end_index") if name in section]:
            raise ValueError(f"sampling.{unread[0]} is not read with a list in sampling.prompts; remove it")
        given = {"negative": sampling.negative_prompt, "audio": sampling.audio}
        given["refs"] = split_references(sampling.ref)
        prompts = [
            Prompt(number, text, f"prompt_{number:04d}", occurrence=texts[:number].count(text), **given)
            for number, text in enumerate(texts)
        ]
    return sampling, [with_sound(prompt, sampling) for prompt in prompts]
