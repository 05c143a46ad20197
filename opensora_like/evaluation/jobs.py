"""The files that are left to make: what is there already, references, rewritten prompts, and each process' share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from opensora_like import runtime as rt
from opensora_like.checkpoint.weights import newest_of
from opensora_like.conditioning.masks import Given
from opensora_like.config import to_dict
from opensora_like.evaluation.experts import read_expert
from opensora_like.evaluation.outline import check_first_image, check_outline, check_references
from opensora_like.evaluation.prompts import Job, Prompt, caption_of, jobs_of, read_prompts
from opensora_like.evaluation.references import find_reference
from opensora_like.evaluation.refine_prompt import ChatEndpoint, Kind, choose_motion, refine
from opensora_like.evaluation.speech import with_sound
from opensora_like.publish import staged
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import InferenceConfig

# settings that change no pixel of a file
OPERATIONAL = {
    *("prompt", "prompts", "negative_prompt", "ref", "audio"),  # stand in the job
    *("start_index", "end_index", "num_sample"),
    *("batch_size", "offload", "sp_size", "sp_mode", "timeout_minutes", "custom_imports"),
    *("save_dir", "overwrite", "max_reference_mb", "ckpt_path"),  # weights are noted as what ckpt_path means
}
FIRST_IMAGES, REFERENCES = "generated_condition", "references"  # folders within save_dir
NUM_THREADS = 8  # requests under way at once
Result = TypeVar("Result")


def plan(cfg: InferenceConfig, runtime: Runtime) -> list[Job]:
    """The jobs that are left, the same on every rank; rank 0 looks at the disk and asks the network.

    Raises:
        ValueError: prompts that contradict each other or the task, a file made with other settings, a reference or a
            language model that fails, a csv or a reference that is not there, a folder that cannot be written.
    """
    box = {}
    if runtime.is_main:
        try:
            box["jobs"] = [dataclasses.asdict(job.prompt) | {"repeat": job.repeat} for job in _plan(cfg)]
        except (ValueError, OSError) as problem:  # the others are waiting to hear of it
            box["problem"] = str(problem)
    box = json.loads(rt.broadcast_text(json.dumps(box)))
    if "problem" in box:
        raise ValueError(box["problem"])
    return [_job(**row) for row in box["jobs"]]


def _job(repeat: int, refs: Sequence[str], **rest: Any) -> Job:
    return Job(Prompt(**rest, refs=tuple(refs)), repeat)


def share(jobs: Sequence[Job], runtime: Runtime, *, sp_size: int) -> list[Job]:
    """The jobs of this rank; ranks that share videos have the same."""
    return list(jobs[runtime.rank // sp_size :: runtime.world_size // sp_size])


def video_path(cfg: InferenceConfig, job: Job) -> Path:
    """Where the pixels of a job go."""
    return Path(cfg.save_dir) / f"{job.stem}{'.png' if cfg.num_frames == 1 else '.mp4'}"


def record_path(cfg: InferenceConfig, job: Job) -> Path:
    """Where it is written down what a job was made from."""
    return Path(cfg.save_dir) / f"{job.stem}.json"


def first_image_path(cfg: InferenceConfig, job: Job) -> Path:
    """Where the image is kept that a video goes on from."""
    return Path(cfg.save_dir) / FIRST_IMAGES / f"{job.stem}.png"


def _plan(cfg: InferenceConfig) -> list[Job]:
    given = _check_task(cfg)
    jobs = jobs_of(read_prompts(cfg), cfg.num_sample)
    settings = _settings(cfg)
    left = [job for job in jobs if cfg.overwrite or not _is_made(cfg, job, _request(settings, job))]
    if len(left) < len(jobs):
        logger.info("%d of %d files are there already", len(jobs) - len(left), len(jobs))
    prompts = {job.prompt.number: job.prompt for job in left}
    requests = {n: _request(settings, Job(p, 0)) for n, p in prompts.items()}
    done = _each(lambda n: _prepared(prompts[n], cfg, requests[n], given), list(prompts))
    ready = dict(zip(prompts, done, strict=True))
    Path(cfg.save_dir).mkdir(parents=True, exist_ok=True)
    for job in left:
        _clear(cfg, job, request := _request(settings, job))
        _write_record(cfg, Job(ready[job.prompt.number], job.repeat), request)
    return [Job(ready[job.prompt.number], job.repeat) for job in left]


def _check_task(cfg: InferenceConfig) -> Given:
    """What the task is given, once it fits the settings; before anything is loaded."""
    read_expert(cfg)
    given = check_outline(cfg)
    if cfg.ref is not None and not any(given):
        raise ValueError(f"ref={cfg.ref!r} is not used with cond_type={cfg.cond_type!r}; add --cond-type i2v_head")
    if cfg.first_image is not None and max(given) != 1:
        raise ValueError(
            f"first_image draws one image, which cond_type={cfg.cond_type!r} does not go on from; use --cond-type "
            "i2v_head, or --first-image none"
        )
    if cfg.first_image is not None:
        check_first_image(cfg.first_image)
    return given


def _settings(cfg: InferenceConfig) -> dict[str, Any]:
    """What all files of a run have in common, as JSON gives it back."""
    found = {name: value for name, value in to_dict(cfg).items() if name not in OPERATIONAL}
    published = found["model"].pop("from_pretrained", None)  # like ckpt_path, it is noted as the file that it means
    source = cfg.ckpt_path or published
    found["weights"] = str(newest_of(Path(source), "ckpt_path").resolve()) if source else None
    if other := read_expert(cfg):
        found["other_weights"] = str(newest_of(Path(other.source), "other_expert").resolve())
    return json.loads(json.dumps(found))


def _request(settings: dict[str, Any], job: Job) -> dict[str, Any]:
    """All that decides over the pixels of a job, but for what a language model adds."""
    prompt = job.prompt
    own = {"text": prompt.text, "negative": prompt.negative, "refs": list(prompt.refs), "occurrence": prompt.occurrence}
    own["audio"] = prompt.audio
    return {**settings, **own, "repeat": job.repeat}


def _is_made(cfg: InferenceConfig, job: Job, request: dict[str, Any]) -> bool:
    """Whether the file is there, whole and made as asked. A file has its name only when it is whole.

    Raises:
        ValueError: it was made otherwise, or nothing says how.
    """
    path = video_path(cfg, job)
    if not path.exists():
        return False
    record = _read_record(record_path(cfg, job))
    if record is None:
        raise ValueError(
            f"{str(path)!r} is there and nothing says what it was made from; choose another --save-dir, or replace it "
            "with --overwrite True"
        )
    if changed := _changed(record["request"], request):
        name, (old, new) = next(iter(changed.items()))
        raise ValueError(
            f"{str(path)!r} is there and was made with {name}={old!r}, now it is {new!r} ({len(changed)} settings "
            "differ); choose another --save-dir, or replace it with --overwrite True"
        )
    return True


def _clear(cfg: InferenceConfig, job: Job, request: dict[str, Any]) -> None:
    """Take away what belongs to another request, so that it is not taken for this one's."""
    record = _read_record(record_path(cfg, job))
    if cfg.overwrite or record is None or _changed(record["request"], request):
        for path in (video_path(cfg, job), first_image_path(cfg, job)):
            path.unlink(missing_ok=True)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("request"), dict) else None


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that both know and that differ; one that only a newer version knows says nothing."""
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def _write_record(cfg: InferenceConfig, job: Job, request: dict[str, Any]) -> None:
    prompt = job.prompt
    record = {
        "prompt": prompt.text,
        "refined_prompt": prompt.refined,
        "motion_score": prompt.motion,
        "caption": caption_of(prompt, cfg),
        "seed": cfg.seed + job.repeat,
        "references": list(prompt.refs),
        "request": request,
    }
    with staged(record_path(cfg, job), shared=True) as draft:
        draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _each(function: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    """Results in the order of `items`, several computed at once; the first error is raised."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepared(prompt: Prompt, cfg: InferenceConfig, request: dict[str, Any], given: Given) -> Prompt:
    """`prompt` with local references, its refined text and its motion score."""
    return _refined(with_sound(_with_references(prompt, cfg, given), cfg), cfg, request)


def _with_references(prompt: Prompt, cfg: InferenceConfig, given: Given) -> Prompt:
    if not any(given):
        return dataclasses.replace(prompt, refs=())
    if not prompt.refs and cfg.first_image is None:
        raise ValueError(
            f"row {prompt.number} ({prompt.name!r}) has no reference, and cond_type={cfg.cond_type!r} needs one; give "
            "--ref or a column 'ref', or --cond-type t2v"
        )
    folder, max_bytes = Path(cfg.save_dir) / REFERENCES, int(cfg.max_reference_mb * 1e6)
    found = [find_reference(ref, table_path=cfg.prompts, folder=folder, max_bytes=max_bytes) for ref in prompt.refs]
    check_references(found, given, cond_type=cfg.cond_type)
    return dataclasses.replace(prompt, refs=tuple(found))


def _refined(prompt: Prompt, cfg: InferenceConfig, request: dict[str, Any]) -> Prompt:
    """Ask the language model, unless the record of an interrupted run has its answers."""
    is_dynamic = cfg.motion_score == "dynamic"
    if not cfg.refine_prompt and not is_dynamic:
        return prompt
    for repeat in range(cfg.num_sample):
        record = None if cfg.overwrite else _read_record(record_path(cfg, Job(prompt, repeat)))
        if record and not _changed(record["request"], {**request, "repeat": repeat}):
            return dataclasses.replace(prompt, refined=record["refined_prompt"], motion=record["motion_score"])
    endpoint = ChatEndpoint.from_environment("refine_prompt" if cfg.refine_prompt else "motion_score='dynamic'")
    if cfg.refine_prompt:
        kind: Kind = "t2i" if cfg.num_frames == 1 else "i2v" if prompt.refs else "t2v"
        prompt = dataclasses.replace(prompt, refined=refine(endpoint, prompt.text, kind))
        logger.info("prompt %r became %r", prompt.text, prompt.refined)
    if is_dynamic:
        prompt = dataclasses.replace(prompt, motion=choose_motion(endpoint, prompt.spoken))
        logger.info("prompt %r has motion score %g", prompt.text, prompt.motion)
    return prompt
