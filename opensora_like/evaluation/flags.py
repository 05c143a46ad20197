"""Flags that Open-Sora v2 documents or reads under another name, for commands that were written for it."""

from __future__ import annotations

from collections.abc import Sequence

SAME_NAME = (
    *("resolution", "aspect_ratio", "height", "width", "num_frames", "num_steps", "seed"),
    *("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci"),
)
# published spelling -> setting here
PUBLISHED: dict[str, str] = {
    "dataset.data_path": "prompts",
    "offload_model": "offload",
    "prompt_refine": "refine_prompt",
    "ae": "autoencoder",
    "t5": "encoders.text",
    "clip": "encoders.pooled",
    "sampling_option.flow_shift": "scheduler.shift",
    **{f"sampling_option.{name}": name for name in SAME_NAME},
}


def translate(arguments: Sequence[str]) -> list[str]:
    """A command line with published spellings replaced; everything else is passed on as it is, to be checked there.

    Source: the README of hpcaitech/Open-Sora and its scripts/diffusion/inference.py.
    """
    return [_translated(word) if word.startswith("--") else word for word in arguments]


def _translated(word: str) -> str:
    key, sep, value = word[2:].partition("=")
    plain = key.replace("-", "_")
    for published, own in PUBLISHED.items():
        if plain == published or plain.startswith(f"{published}."):
            return f"--{own}{plain[len(published) :]}{sep}{value}"
    return word
