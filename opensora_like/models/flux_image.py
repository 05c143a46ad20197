"""FLUX through diffusers: the image that a text-to-image-to-video run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like.registry import MODELS

TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
MULTIPLE = 16  # pixels: FLUX's autoencoder (8) times its patch (2)


@MODELS.register_module("flux_image")
class FluxImage:
    """Draws images with FLUX.1; nothing is read before `load`.

    Args:
        from_pretrained: folder of a `FluxPipeline`, as diffusers saves and downloads it.
        resolution: pixels of the image, "768px"; its ratio is the one of `datasets.aspect` nearest to the video's.
        num_steps: of the sampler.
        guidance: the scale given to the model, which was distilled with it: one forward per step.
        share_encoders: take the run's encoders "text" and "pooled" instead of the pipeline's own, which then are not
            loaded. Those of Open-Sora v2 are FLUX's: T5 v1.1 XXL, 512 tokens, and CLIP ViT-L/14.

    Raises:
        ValueError: a number out of range.

    Source: Open-Sora v2 (arXiv:2503.09642), t2i2v; hpcaitech/Open-Sora:configs/diffusion/inference/plugins/t2i2v.py.
    """

    def __init__(
        self,
        from_pretrained: str,
        *,
        resolution: str = "768px",
        num_steps: int = 50,
        guidance: float = 4.0,
        share_encoders: bool = False,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"first_image.num_steps={num_steps} must be 1 or more")
        self.from_pretrained, self.resolution = from_pretrained, resolution
        self.num_steps, self.guidance, self.share_encoders = num_steps, guidance, share_encoders
        self._pipeline: Any = None
        self._device = torch.device("cpu")

    def load(self, device: torch.device, dtype: torch.dtype, *, offload: bool) -> None:
        """Read the weights.

        Args:
            offload: each part is on the device only while it runs; without a GPU there is nothing to save.

        Raises:
            FileNotFoundError: no folder of a pipeline.
            ValueError: the folder holds another pipeline.
        """
        folder, self._device = Path(self.from_pretrained), device
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"first_image.from_pretrained={self.from_pretrained!r} has no model_index.json; put FLUX.1-dev there "
                "in the layout of diffusers, or give its folder"
            )
        kind = json.loads(index.read_text()).get("_class_name")
        if kind != "FluxPipeline":
            raise ValueError(f"first_image.from_pretrained={self.from_pretrained!r} holds a {kind}, not a FluxPipeline")
        from diffusers import FluxPipeline

        left_out = dict.fromkeys(TEXT_PARTS) if self.share_encoders else {}
        self._pipeline = FluxPipeline.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True, **left_out)
        self._pipeline.set_progress_bar_config(disable=True)
        if offload and device.type != "cpu":
            self._pipeline.enable_model_cpu_offload(device=device)
        else:
            self._pipeline.to(device)

    @torch.no_grad()
    def draw(
        self,
        text: str,
        size: tuple[int, int],
        *,
        generator: torch.Generator,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> np.ndarray:
        """One image.

        Args:
            size: height and width in pixels, multiples of 16.
            generator: on the CPU, so that the image does not depend on the device.
            embeddings: with `share_encoders`: of the text, [1, L, D] by tokens and [1, D] pooled.

        Returns: uint8 [H, W, 3].
        """
        assert self._pipeline is not None, "load() comes first"
        given = {"prompt": text}
        if embeddings is not None:
            # as the pipeline's own encoders would give them
            tokens, pooled = (e.to(self._device, self._pipeline.transformer.dtype) for e in embeddings)
            given = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
        (image,) = self._pipeline(
            **given,
            height=size[0],
            width=size[1],
            num_inference_steps=self.num_steps,
            guidance_scale=self.guidance,
            generator=generator,
            output_type="np",
        ).images
        return np.rint(image * 255).astype(np.uint8)
