"""The denoiser of FantasyTalking (arXiv:2504.04842): Wan 2.1 image to video, with speech in every cross-attention.

Letters of the shape suffixes: B batch, C channels, T time, H W space, L tokens, K audio vectors, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from opensora_like.models.base import ParallelPlan
from opensora_like.models.fantasy_talking import convert
from opensora_like.models.fantasy_talking.blocks import AudioProjection, SpeechAttention, SpeechContext
from opensora_like.models.fantasy_talking.windows import heard_vectors, window_mask
from opensora_like.models.wan import Wan
from opensora_like.models.wan.config import Variant
from opensora_like.registry import MODELS


@MODELS.register_module("fantasy_talking")
class FantasyTalking(Wan):
    """Wan with one more condition, "audio"; a `Denoiser`.

    It is a `Wan` and not something that holds one: its weights have the names of Wan's, so that weights and adapters
    of either fit the other, and whatever is true of Wan's tokens and of how it is cut stays true. Added are
    `proj_model` and, in every cross-attention, a processor with keys and values of the audio. Where these are zero, as
    they begin, outputs are those of Wan to the last bit.

    Audio is heard by latent frame: each attends to the vectors around its own time, see `windows`. Vectors of zeros
    at the end are none: they fill up a batch of clips of different lengths, and a clip with nothing but zeros is one
    without audio, to which the audio adds exactly nothing.

    Args:
        variant, config, num_attention_heads, attention_head_dim, ffn_dim, num_layers, in_channels, out_channels,
            text_dim, freq_dim, image_dim, cross_attn_norm, text_length, ungiven, grad_checkpoint, from_pretrained,
            cache_dir, strict_load: as `Wan`.
        audio_dim: width of the audio encoder's vectors.
        audio_width: to which they are projected.
        audio_scale: how much of what the audio says counts; trained at 1.
        audio_pretrained: the published file of the added weights (fantasytalking_model.ckpt), or any with their names,
            put over `from_pretrained`.

    Raises:
        ValueError, FileNotFoundError: as `Wan`.

    Source: FantasyTalking, arXiv:2504.04842; Fantasy-AMAP/fantasy-talking:model.py.
    """

    def __init__(
        self,
        variant: Variant | None = None,
        *,
        config: str | None = None,
        num_attention_heads: int | None = None,
        attention_head_dim: int | None = None,
        ffn_dim: int | None = None,
        num_layers: int | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        text_dim: int | None = None,
        freq_dim: int | None = None,
        image_dim: int | None = None,
        cross_attn_norm: bool | None = None,
        text_length: int | None = 512,
        ungiven: Literal["grey", "zero"] | None = None,
        grad_checkpoint: int | bool = False,
        from_pretrained: str | None = None,
        cache_dir: str | None = None,
        strict_load: bool = True,
        audio_dim: int = 768,
        audio_width: int = 2048,
        audio_scale: float = 1.0,
        audio_pretrained: str | None = None,
    ) -> None:
        super().__init__(
            variant,
            config=config,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            image_dim=image_dim,
            cross_attn_norm=cross_attn_norm,
            text_length=text_length,
            ungiven=ungiven,
            grad_checkpoint=grad_checkpoint,
            from_pretrained=from_pretrained,
            cache_dir=cache_dir,
            strict_load=strict_load,
        )
        for name, value in (("audio_dim", audio_dim), ("audio_width", audio_width)):
            if value < 1:
                raise ValueError(f"model.{name}={value} must be 1 or more")
        self.audio_dim, self.audio_scale = audio_dim, audio_scale
        self.also_pretrained = {} if audio_pretrained is None else {"model.audio_pretrained": audio_pretrained}
        self.condition_names = self.condition_names | {"audio"}
        self.proj_model = AudioProjection(audio_dim, audio_width)
        for block in self.blocks:
            block.attn2.set_processor(SpeechAttention(audio_width, self.sizes.dim))

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity at `x_BCTHW`.

        Args:
            t_B: as `Wan`.
            conditions: those of `Wan`, and "audio" [B, K, audio_dim], zero beyond each clip's end.

        Returns: as `Wan`.

        Raises:
            ValueError: as `Wan`.
        """
        return super().forward(x_BCTHW, t_B, conditions)

    def _embed_context(self, conditions: Mapping[str, Tensor], ids_LA: Tensor, num_frames: int) -> SpeechContext:
        text_BLD, image_BLD = super()._embed_context(conditions, ids_LA, num_frames)
        audio_BKD = conditions["audio"]
        heard_BTK = window_mask(heard_vectors(audio_BKD), num_frames, audio_BKD.shape[1])
        audio_BKC = self.proj_model(audio_BKD.to(self.proj_model.proj.weight.dtype))
        return SpeechContext(text_BLD, image_BLD, audio_BKC, heard_BTK[:, ids_LA[:, 0]], self.audio_scale)

    def parallel_plan(self) -> ParallelPlan:
        """As Wan's; keys and values of the audio are cut along the heads, the projection stays whole."""
        plan = super().parallel_plan()
        return replace(plan, column={**plan.column, **{f"blocks.*.attn2.processor.{n}_proj": () for n in "kv"}})

    def adapt_weights(self, weights: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
        """Published weights of any layout, of Wan or of what is added, under this model's names."""
        own = convert.to_diffusers(weights)
        return own, [] if own.keys() == weights.keys() else [f"{len(own)} tensors renamed as diffusers names them"]

    def _check_inputs(self, x_BCTHW: Tensor, conditions: Mapping[str, Tensor]) -> None:
        super()._check_inputs(x_BCTHW, conditions)
        found = tuple(conditions["audio"].shape)
        if len(found) != 3 or found[0] != len(x_BCTHW) or found[2] != self.audio_dim:
            raise ValueError(
                f"fantasy_talking condition 'audio' has shape {found}, [{len(x_BCTHW)}, K, {self.audio_dim}] is needed;"
                " model.audio_dim is the width of the audio encoder's vectors"
            )
