"""Sampling with sound: which file a prompt speaks, how long the video is, what the denoiser hears, and the sound track.

Letters of the shape suffixes: B batch, K vectors, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like.conditioning.sound import CONDITION, encode_sound
from opensora_like.datasets.audio_io import SAMPLE_RATE, read_sound, sound_seconds
from opensora_like.datasets.video_io import find_file
from opensora_like.datasets.video_writing import Sound
from opensora_like.evaluation.placement import in_use
from opensora_like.evaluation.prompts import Job, Prompt
from opensora_like.models.base import Denoiser, encoders_of
from opensora_like.schedulers.samplers import Guidance
from opensora_like.settings import InferenceConfig

TRACK_RATE = 48_000  # of the sound in files, samples per second


def hears(cfg: InferenceConfig) -> bool:
    """Whether the encoders of a run make the condition of a denoiser that hears."""
    return CONDITION in cfg.encoders


def with_sound(prompt: Prompt, cfg: InferenceConfig) -> Prompt:
    """`prompt` with the file that its `audio` means: as written, or beside the csv.

    Raises:
        ValueError: a model that hears and nothing to hear, or sound for one that does not.
        FileNotFoundError: no such file.
    """
    row = f"row {prompt.number} ({prompt.name!r})"
    if not hears(cfg):
        if prompt.audio is not None:
            raise ValueError(f"{row} has audio={prompt.audio!r}, and the denoiser hears nothing; remove it")
        return prompt
    audio = _heard_by(prompt)
    path = find_file(audio, table_path=cfg.prompts) if cfg.prompts else audio
    if not Path(path).is_file():
        raise FileNotFoundError(f"{row}: audio={prompt.audio!r} does not exist")
    return replace(prompt, audio=path)


def _heard_by(prompt: Prompt) -> str:
    if prompt.audio is None:
        raise ValueError(f"row {prompt.number} ({prompt.name!r}) has nothing to hear; give --audio or a column 'audio'")
    return prompt.audio


def frames_of_sound(seconds: float, fps: float, *, most: int) -> int:
    """How many frames show all of a sound: 4k + 1, the last few of them after its end; `most` at most.

    Source: Fantasy-AMAP/fantasy-talking:infer.py.
    """
    return min(int(fps * seconds // 4) * 4 + 5, most)


def batches(cfg: InferenceConfig, jobs: Sequence[Job]) -> Iterator[tuple[int, Sequence[Job]]]:
    """Number of frames, and at most `batch_size` jobs that follow each other and are that long.

    Raises:
        ValueError: a job without sound for a model that hears.
        BadSample: a sound that cannot be read.
    """

    def length(job: Job) -> int:
        if not hears(cfg):
            return cfg.num_frames
        seconds = sound_seconds(_heard_by(job.prompt))
        return frames_of_sound(seconds, cfg.fps_save, most=cfg.num_frames)

    for num_frames, group in groupby(jobs, key=length):
        equal = list(group)
        for first in range(0, len(equal), cfg.batch_size):
            yield num_frames, equal[first : first + cfg.batch_size]


def guided_by_sound(cfg: InferenceConfig, guidance: Guidance, model: Denoiser) -> Guidance:
    """The scales of a model that hears: guidance by sound in place of that by a given frame.

    With u the velocity of the negative prompt without sound, d the same with it, and c that of prompt and sound, it is
    u + audio_guidance (d - u) + guidance (c - d).

    Raises:
        ValueError: scales of guidance that would have no effect.

    Source: VideoX-Fun:videox_fun/pipeline/pipeline_fantasy_talking.py.
    """
    if CONDITION not in model.condition_names:
        if cfg.audio_guidance is not None:
            raise ValueError(f"audio_guidance={cfg.audio_guidance}: the denoiser hears nothing; remove it")
        return guidance
    if guidance.image != 1:
        raise ValueError(
            f"guidance_img={cfg.guidance_img}: a denoiser that hears is guided by its sound instead; set "
            "guidance_img=1.0 and audio_guidance"
        )
    scale = 1.0 if cfg.audio_guidance is None else cfg.audio_guidance
    return replace(guidance, image=scale, image_osci=False, scale_temporal_osci=False)


def encode_jobs(
    encoders: Mapping[str, Any], jobs: Sequence[Job], num_frames: int, cfg: InferenceConfig, device: torch.device
) -> dict[str, Tensor]:
    """What is heard of the sound of each job while the frames are shown, silent after its end; {} without encoders.

    Raises:
        BadSample: a sound that cannot be read.
    """
    found: dict[str, Tensor] = {}
    for name in encoders_of("audio", encoders):
        num_samples = round(num_frames / cfg.fps_save * SAMPLE_RATE)
        sounds = [_read(_heard_by(job.prompt), num_samples, rate=SAMPLE_RATE) for job in jobs]
        with in_use(encoders[name], device, offload=cfg.offload):
            found[name] = encode_sound(encoders[name], [torch.from_numpy(sound) for sound in sounds])
    return found


def without(heard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without sound, as training drops it: vectors of zeros, to which the denoiser does not attend."""
    return {name: torch.zeros_like(vectors_BKD) for name, vectors_BKD in heard.items()}


def sound_track(audio: str | None, num_frames: int, fps: float) -> Sound | None:
    """The sound of a file for so many frames, None where there is no file."""
    if audio is None:
        return None
    return Sound(_read(audio, round(num_frames / fps * TRACK_RATE), rate=TRACK_RATE), TRACK_RATE)


def _read(path: str, num_samples: int, *, rate: int) -> np.ndarray:
    return read_sound(path, 0.0, num_samples, rate=rate, may_lack_seconds=math.inf)
