"""The two published Wan autoencoders: their settings, and the original names of the newer one's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Version = Literal["2.1", "2.2"]

# arguments of diffusers' AutoencoderKLWan; "2.1" are its defaults
VERSIONS: dict[str, dict[str, Any]] = {
    "2.1": {"z_dim": 16, "base_dim": 96},
    "2.2": {
        "z_dim": 48,
        "base_dim": 160,
        "decoder_base_dim": 256,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [
            *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
            *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
            *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
            *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        ],
        "latents_std": [
            *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
            *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
            *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
            *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
        ],
    },
}
_DEFAULTS = {"scale_factor_temporal": 4, "scale_factor_spatial": 8, "patch_size": None, "is_residual": False}
NUM_RESNETS = {"down": 2, "up": 3}  # of a block; what follows them changes the size
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
_TOP = {
    **{f"{part}.conv1": f"{part}.conv_in" for part in ("encoder", "decoder")},
    **{f"{part}.head.0": f"{part}.norm_out" for part in ("encoder", "decoder")},
    **{f"{part}.head.2": f"{part}.conv_out" for part in ("encoder", "decoder")},
    **{f"{part}.middle.{2 * i}": f"{part}.mid_block.resnets.{i}" for part in ("encoder", "decoder") for i in (0, 1)},
    **{f"{part}.middle.1": f"{part}.mid_block.attentions.0" for part in ("encoder", "decoder")},
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
}


def version_of(config: Mapping[str, Any]) -> Version | None:
    """Which of the two a diffusers config describes, whatever its widths; None for another."""
    found = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    for version, settings in VERSIONS.items():
        if found == {name: settings.get(name, default) for name, default in _DEFAULTS.items()}:
            return version
    return None


def is_version_2_2(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors under diffusers' or the original names are of the newer one: it folds 2x2 pixels first."""
    first = weights.get("encoder.conv_in.weight", weights.get("encoder.conv1.weight"))
    return first is not None and first.shape[1] == VERSIONS["2.2"]["in_channels"]


def to_diffusers_2_2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``Wan2.2_VAE.pth`` under diffusers' names, which know this file of Wan 2.1 alone.

    Source of the names: Wan-Video/Wan2.2:wan/modules/vae2_2.py.
    """
    return {_renamed(name): tensor for name, tensor in weights.items()}


def _renamed(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    if match is not None:
        part, way, block, place, rest = match.groups()
        resnet = int(place) < NUM_RESNETS[way]
        return f"{part}.{way}_blocks.{block}." + (
            f"resnets.{place}.{_in_resnet(rest)}" if resnet else f"{way}sampler.{rest}"
        )
    for old, new in _TOP.items():
        if name.startswith(f"{old}."):
            rest = name.removeprefix(f"{old}.")
            return f"{new}.{_in_resnet(rest) if '.resnets.' in new else rest}"
    return name


def _in_resnet(rest: str) -> str:
    for old, new in _RESIDUAL.items():
        if rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    return rest.replace("shortcut.", "conv_shortcut.", 1)
