"""A frozen CLIP image encoder: what Wan's image-to-video models see of the given frame beside its latents.

Letters of the shape suffixes: B batch, C channels, H W space, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora_like.models.tiny_encoders import tiny_vision
from opensora_like.registry import MODELS, nearest

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "image_size": 16, "patch_size": 8, "seed": 0}
LAYER = -2  # Wan takes the tokens before the last layer


@MODELS.register_module("clip_vision")
class CLIPImageEncoder(nn.Module):
    """Tokens of an image from transformers' ``CLIPVisionModel``, of the layer before the last, as Wan takes them.

    Args:
        from_pretrained: folder of weights and ``preprocessor_config.json``; of a pipeline's folder its
            ``image_encoder`` and ``image_processor`` are taken.
        tiny: instead: sizes of an encoder with fixed random weights; any of hidden_size, num_layers, num_heads,
            image_size, patch_size, seed. ``{}`` takes the defaults. For tests.
        dtype: of weights and embeddings.

    Raises:
        ValueError: both or neither of `from_pretrained` and `tiny`, a size that does not exist.
        FileNotFoundError: there is no such folder.

    Source: Wan, arXiv:2503.20314, section 5.1; diffusers:pipelines/wan/pipeline_wan_i2v.py.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    ) -> None:
        super().__init__()
        if (from_pretrained is None) == (tiny is None):
            raise ValueError(
                f"clip_vision encoder: from_pretrained={from_pretrained!r} and tiny={tiny!r}; give exactly one of a"
                " folder and the sizes of a tiny random encoder"
            )
        self.model, self._prepare = _tiny(tiny) if tiny is not None else _load(str(from_pretrained))
        self.model.to(DTYPES[dtype]).requires_grad_(False).eval()
        self.output_dim = int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> CLIPImageEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images_BCHW: in [-1, 1], of any size; brought to the encoder's by the published preprocessing, on 8 bits.

        Returns: [B, L, D], the class token first; on the encoder's device.
        """
        weight = next(self.model.parameters())
        pixels = prepared(images_BCHW, self._prepare).to(weight, non_blocking=True)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[LAYER]


def prepared(images_BCHW: Tensor, prepare: Any) -> Tensor:
    """What an encoder is shown of images in [-1, 1]: as 8 bits through a processor of transformers. On the CPU."""
    images = ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return prepare(images=list(images), return_tensors="pt").pixel_values


def _load(source: str) -> tuple[nn.Module, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    root = Path(source)
    parts = root / "image_encoder", root / "image_processor"
    folders = parts if all(part.is_dir() for part in parts) else (root, root)
    for folder, name in zip(folders, ("config.json", "preprocessor_config.json"), strict=True):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"clip_vision encoder: from_pretrained={source!r} has no {folder / name}; give the folder of a Wan i2v"
                " pipeline, or of a CLIP image encoder with its preprocessor"
            )
    return CLIPVisionModel.from_pretrained(folders[0]), CLIPImageProcessor.from_pretrained(folders[1])


def _tiny(tiny: Mapping[str, int]) -> tuple[nn.Module, Any]:
    from transformers import CLIPVisionModel

    for key in tiny:
        if key not in TINY:
            raise ValueError(f"clip_vision encoder: tiny has no {key!r}; {nearest(key, TINY)}")
    sizes = {**TINY, **tiny}
    config, processor = tiny_vision(sizes, image_size=sizes["image_size"], patch_size=sizes["patch_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes["seed"])
        model = CLIPVisionModel(config)
    return model, processor
