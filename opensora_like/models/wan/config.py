"""Sizes of the published Wan models, and how they are read from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from opensora_like.registry import fit

Variant = Literal["t2v-1.3B", "t2v-14B", "i2v-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B"]

_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")  # of the original code
VARIANTS: dict[str, dict[str, Any]] = {
    "t2v-1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "t2v-14B": _14B,
    "i2v-14B": {**_14B, "in_channels": 36, "image_dim": 1280},
    "t2v-A14B": _14B,  # Wan 2.2: each of its two experts
    "i2v-A14B": {**_14B, "in_channels": 36},
    "ti2v-5B": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
}
# setting of a config.json -> what can be built of it; the first names are diffusers', the others of VideoX-Fun's code
ONLY: dict[str, tuple[Any, ...]] = {
    "qk_norm": ("rms_norm_across_heads",),
    "pos_embed_seq_len": (None,),
    "window_size": ([-1, -1],),
    "add_control_adapter": (False,),
    "add_ref_conv": (False,),
}


@dataclass(frozen=True)
class WanSizes:
    """What the weights of a Wan denoiser depend on; the names are those of diffusers' config.json.

    Args:
        in_channels: of latents and visual condition together; `out_channels` where there is none.
        image_dim: width of the image embeddings (CLIP), or None for a model without.
        patch_size: of t, h and w.
    """

    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int | None = None
    cross_attn_norm: bool = True
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        counts = ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "out_channels", "text_dim")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 1 or more")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                f"model.attention_head_dim={self.attention_head_dim} must be even and 6 or more: pairs in t, h and w"
            )
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise ValueError(f"model.patch_size={self.patch_size!r} must be (1, n, n): square patches of single frames")
        if self.in_channels != self.out_channels and self.in_channels <= 2 * self.out_channels:
            raise ValueError(
                f"model.in_channels={self.in_channels} must be out_channels={self.out_channels} (t2v), or more than"
                f" {2 * self.out_channels}: latents, mask and latents of the given frames (i2v: 16 + 4 + 16 = 36)"
            )

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """How a head's width is shared among positions in t, h and w."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


def resolve_sizes(variant: str | None, config: str | None, given: Mapping[str, Any]) -> WanSizes:
    """The sizes of a variant or a config file, with those that were given in their place.

    Args:
        given: size -> value, None where it was not given.

    Raises:
        ValueError: both sources, a size that has none, or sizes that do not fit.
    """
    if variant is not None and config is not None:
        raise ValueError(f"model.variant={variant!r} and model.config={config!r} both name the sizes; give one")
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"model.variant={variant!r} is not one of {sorted(VARIANTS)}")
    sizes = dict(VARIANTS[variant]) if variant is not None else {}
    if config is not None:
        sizes = read_config(config)
    sizes |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in VARIANTS["t2v-14B"] if name not in sizes]
    if missing:
        raise ValueError(f"model: wan has no {missing}; give them, or variant=, one of {sorted(VARIANTS)}, or config=")
    return WanSizes(**sizes)


def read_config(path: str) -> dict[str, Any]:
    """The sizes in a ``config.json``, of diffusers' layout or of the original one.

    Args:
        path: the file, its folder, or the folder of a pipeline with ``transformer/`` in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model, or asks for what is not built here.
    """
    file = _find_config(path)
    where = f"model.config={str(file)!r}"
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{where} is not a table of settings")
    if config.get("_class_name", "WanTransformer3DModel") not in ("WanTransformer3DModel", "WanModel"):
        raise ValueError(f"{where} is of a {config['_class_name']!r}, not of a Wan transformer")
    if "dim" in config:
        config = _from_original(config, where, shows_image=_shows_image(file.parent))
    for name, allowed in ONLY.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{where}: {name}={config[name]!r}, only {list(allowed)} can be built")
    hints = {"image_dim": int | None, "cross_attn_norm": bool, "eps": float, "patch_size": tuple[int, int, int]}
    known = [f.name for f in fields(WanSizes) if f.name in config]
    return {name: fit(config[name], hints.get(name, int), f"{where}: {name}") for name in known}


def _find_config(path: str) -> Path:
    root = Path(path)
    candidates = [root] if root.suffix == ".json" else [root / "config.json", root / "transformer" / "config.json"]
    for file in candidates:
        if file.is_file():
            return file
    raise FileNotFoundError(f"model.config={path!r}: there is no {' and no '.join(str(c) for c in candidates)}")


def _shows_image(folder: Path) -> bool:
    """Whether an original i2v model is shown CLIP's tokens, which Wan 2.1 is and an expert of Wan 2.2 is not.

    Their configs are the same; the weights differ, and where there are none, the names of the experts' folders tell.
    """
    names: set[str] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names |= json.loads(index.read_text())["weight_map"].keys()
    for file in sorted(folder.glob("*.safetensors")) if not names else ():
        with file.open("rb") as data:  # 8 bytes of length, then a table of the tensors
            names |= json.loads(data.read(int.from_bytes(data.read(8), "little"))).keys()
    if names:
        return any("img_emb." in name for name in names)
    return folder.name not in EXPERT_FOLDERS


def _from_original(config: Mapping[str, Any], where: str, *, shows_image: bool) -> dict[str, Any]:
    """diffusers' names for the settings of the original code."""
    renamed = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
    # the original names win: VideoX-Fun saves an `in_channels` beside `in_dim` that its model does not read
    out = {**config, **{new: config[name] for name, new in renamed.items() if name in config}}
    if config.get("qk_norm") is True:  # there a switch, over all heads at once
        out["qk_norm"] = "rms_norm_across_heads"
    heads = out.get("num_attention_heads", 0)
    if heads < 1 or config["dim"] % heads:
        raise ValueError(f"{where}: dim={config['dim']} does not divide by num_heads={heads}")
    out["attention_head_dim"] = config["dim"] // heads
    if config.get("model_type") == "i2v" and "image_dim" not in out and shows_image:
        out["image_dim"] = 1280  # CLIP ViT-H/14; fixed in the original code
    return out
