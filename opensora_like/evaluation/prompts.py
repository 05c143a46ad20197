"""What to make: the prompts of a sampling run, and the caption that each becomes."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from opensora_like.datasets.video_text import caption_with_suffix
from opensora_like.runtime import logger
from opensora_like.settings import InferenceConfig

COLUMNS = ["text", "name", "neg", "ref", "audio"]


@dataclass(frozen=True)
class Prompt:
    """One row of what to make.

    Args:
        number: its row, from 0.
        text: as the user wrote it. With `occurrence` (how many earlier rows have the same text) it is the seed's part
            that belongs to the prompt, so noise depends neither on the row nor on the other rows.
        name: stem of its files.
        negative: text of the unconditional branch.
        refs: files or addresses of its references.
        refined: what a language model made of `text`; None where it was not asked.
        motion: the motion score of this prompt; None takes the run's.
        audio: file of what is said.
    """

    number: int
    text: str
    name: str
    negative: str
    refs: tuple[str, ...] = ()
    occurrence: int = 0
    refined: str | None = None
    motion: float | None = None
    audio: str | None = None

    @property
    def spoken(self) -> str:
        """The text that models are given."""
        return self.text if self.refined is None else self.refined


class Job(NamedTuple):
    """One file to make: sample `repeat` of a prompt."""

    prompt: Prompt
    repeat: int

    @property
    def stem(self) -> str:
        """Name of its files without the suffix."""
        return self.prompt.name + (f"_{self.repeat}" if self.repeat else "")


def read_prompts(cfg: InferenceConfig) -> list[Prompt]:
    """The prompts that a config names: one, or the rows of a csv.

    Raises:
        ValueError: none or both are given, a csv without rows or the column `text`, no text, two rows with one
            name, or a setting that would not be used.
        FileNotFoundError: no such csv.
    """
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise ValueError("give one of --prompt 'some text' and --prompts file.csv")
    if cfg.prompt is not None:
        if not cfg.prompt.strip():
            raise ValueError(f"prompt={cfg.prompt!r} has no text; write one")
        if (cfg.start_index, cfg.end_index) != (0, None):
            raise ValueError(
                f"start_index={cfg.start_index}, end_index={cfg.end_index} count rows of --prompts, and --prompt is "
                "given; leave them out"
            )
        return [Prompt(0, cfg.prompt, "prompt_0000", cfg.negative_prompt, split_references(cfg.ref), audio=cfg.audio)]
    if cfg.ref is not None:
        raise ValueError(f"ref={cfg.ref!r} belongs to --prompt; with --prompts write references in the column 'ref'")
    if cfg.audio is not None:
        raise ValueError(f"audio={cfg.audio!r} belongs to --prompt; with --prompts write files in the column 'audio'")
    prompts = _read_csv(Path(cfg.prompts), cfg)
    last = len(prompts) if cfg.end_index is None else cfg.end_index
    if not 0 <= cfg.start_index < last <= len(prompts):
        raise ValueError(
            f"start_index={cfg.start_index}, end_index={cfg.end_index}: {cfg.prompts!r} has rows 0 to "
            f"{len(prompts) - 1}; give 0 <= start_index < end_index <= {len(prompts)}"
        )
    return prompts[cfg.start_index : last]


def _read_csv(path: Path, cfg: InferenceConfig) -> list[Prompt]:
    where = f"prompts={cfg.prompts!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as problem:
        raise ValueError(f"{where} is not a readable csv: {problem}") from problem
    if "text" not in columns:
        raise ValueError(f"{where} has no column 'text'; it has {columns}")
    if not rows:
        raise ValueError(f"{where} has no row below its header; write one for each prompt")
    if unused := [name for name in columns if name not in COLUMNS]:
        logger.warning("%s: columns %s are not used, only %s are; sizes and tasks are flags", where, unused, COLUMNS)
    seen: Counter[str] = Counter()
    prompts = []
    for number, row in enumerate(rows):
        if None in row:
            raise ValueError(
                f"{where}: row {number} (from 0) has {len(row[None])} fields more than the header; put texts with "
                "commas in double quotes"
            )
        text = row["text"] or ""
        if not text.strip():
            raise ValueError(f"{where}: row {number} (from 0) has no text; write one or remove it")
        name = row.get("name") or f"{path.stem}_{number:04d}"
        negative = row.get("neg") or cfg.negative_prompt
        spoken = row.get("audio") or None
        prompts.append(Prompt(number, text, name, negative, split_references(row.get("ref")), seen[text], audio=spoken))
        seen[text] += 1
    _check_names(prompts, cfg)
    return prompts


def split_references(refs: str | None) -> tuple[str, ...]:
    """The files or addresses of a field `ref`, which are joined by ';'."""
    return tuple(ref.strip() for ref in refs.split(";") if ref.strip()) if refs else ()


def _check_names(prompts: Sequence[Prompt], cfg: InferenceConfig) -> None:
    """No two jobs may write one file, and none may write outside of the folder."""
    files: dict[str, Job] = {}
    for job in jobs_of(prompts, cfg.num_sample):
        name = job.prompt.name
        if name != PurePath(name).name or name.startswith("."):
            raise ValueError(
                f"prompts={cfg.prompts!r}: row {job.prompt.number} has the name {name!r}, which is no file name; "
                "leave out folders and a leading dot"
            )
        if other := files.get(job.stem):
            raise ValueError(
                f"prompts={cfg.prompts!r}: sample {other.repeat} of row {other.prompt.number} and sample {job.repeat} "
                f"of row {job.prompt.number} would both write {job.stem!r}; give every row its own name"
            )
        files[job.stem] = job


def jobs_of(prompts: Sequence[Prompt], num_sample: int) -> list[Job]:
    """Every file to make, all samples of a prompt next to each other."""
    if num_sample < 1:
        raise ValueError(f"num_sample={num_sample} must be 1 or more")
    return [Job(prompt, repeat) for prompt in prompts for repeat in range(num_sample)]


def caption_of(prompt: Prompt, cfg: InferenceConfig) -> str:
    """The prompt with the suffix that captions had in training.

    Raises:
        ValueError: ``motion_score='dynamic'`` and nobody has chosen one for the prompt.
    """
    fps = cfg.fps_save if cfg.fps_in_caption and cfg.num_frames > 1 else None
    motion = cfg.motion_score if prompt.motion is None else prompt.motion
    if motion == "dynamic":
        raise ValueError(f"motion_score='dynamic': nothing was chosen for {prompt.text!r}; see evaluation.jobs.plan")
    return caption_with_suffix(prompt.spoken, fps, motion)
