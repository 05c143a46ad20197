"""The denoiser of HunyuanVideo (arXiv:2412.03603), text-to-video and image-to-video, on the blocks of diffusers.

Letters of the shape suffixes: B batch, C channels, T time, H W space, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_like.models.base import ParallelPlan
from opensora_like.models.hunyuan_video import convert
from opensora_like.models.hunyuan_video.blocks import refit_block
from opensora_like.models.hunyuan_video.config import HunyuanSizes, Variant, resolve_sizes
from opensora_like.models.layers import Rope, build_rope
from opensora_like.models.recomputation import recomputed_counts
from opensora_like.models.tokens import position_ids, unpatchify
from opensora_like.registry import MODELS

TIMESTEPS = 1000.0  # what t = 1 and a guidance of 1 are to their embeddings
NOISE_SHARE = 0.999  # of what image-to-video sampling begins with; the rest is the given frame


class _Tokens(NamedTuple):
    """What every block is given beside the tokens.

    Args:
        temb_BD: of time, pooled text and guidance.
        mask: bool [B, 1, 1, L], False for keys that are padding; None where there are none.
        first: with a given first frame, the embedding that its tokens have in the place of `temb_BD`, and how many.
    """

    temb_BD: Tensor
    mask: Tensor | None
    rope: Rope
    first: tuple[Tensor, int] | None

    def arguments(self) -> tuple:
        return (self.temb_BD, self.mask, self.rope, *(self.first or ()))


@MODELS.register_module("hunyuan_video")
class HunyuanVideo(nn.Module):
    """A transformer over latents and text together; a `Denoiser`.

    Embedders, blocks and output layers are those of diffusers' ``HunyuanVideoTransformer3DModel``, and so are the
    names of the weights. Exchanged are the attention of the blocks (`layers.Attention`) and the rotary tables.

    Rows of the condition "text" that are zero throughout are padding: `LLMTextEncoder` zeroes them. What is padding in
    all samples is cut off; what is left of it, where captions of a batch have different lengths, is no key of any
    attention. A batch of one therefore runs without a mask.

    With `token_replace` (i2v) the condition "visual" gives the first latent frame of some or all samples: it takes
    the place of the noisy one, and its tokens are modulated as at t = 0 and without guidance. Other frames cannot be
    given. A sample without a given frame runs as in text-to-video.

    Args:
        variant: "t2v" or "i2v": the sizes of the published models, 13 billion weights each.
        num_attention_heads, attention_head_dim, num_layers, num_single_layers, num_refiner_layers, in_channels,
            mlp_ratio, text_dim, pooled_dim, rope_axes_dim, guidance_embeds, token_replace: in place of those sizes;
            see `HunyuanSizes`. Without a variant the counts, the head's width and the axes are needed.
        grad_checkpoint: see `set_grad_checkpoint`.
        from_pretrained: where weights come from: safetensors or their folder, of a pipeline's folder
            ``transformer/``; names as diffusers or as the original code has them. Nothing is read here.
        strict_load: each weight has to be there.

    Raises:
        ValueError: sizes that are missing or do not fit each other.

    Source: HunyuanVideo, arXiv:2412.03603, section 4.2; diffusers:models/transformers/transformer_hunyuan_video.py.
    """

    def __init__(
        self,
        variant: Variant | None = None,
        *,
        num_attention_heads: int | None = None,
        attention_head_dim: int | None = None,
        num_layers: int | None = None,
        num_single_layers: int | None = None,
        num_refiner_layers: int | None = None,
        in_channels: int | None = None,
        mlp_ratio: float | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        rope_axes_dim: tuple[int, int, int] | None = None,
        guidance_embeds: bool | None = None,
        token_replace: bool | None = None,
        grad_checkpoint: tuple[int, int] | bool = False,
        from_pretrained: str | None = None,
        strict_load: bool = True,
    ) -> None:
        super().__init__()
        given = {
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "num_layers": num_layers,
            "num_single_layers": num_single_layers,
            "num_refiner_layers": num_refiner_layers,
            "in_channels": in_channels,
            "mlp_ratio": mlp_ratio,
            "text_dim": text_dim,
            "pooled_dim": pooled_dim,
            "rope_axes_dim": rope_axes_dim,
            "guidance_embeds": guidance_embeds,
            "token_replace": token_replace,
        }
        self.sizes = sizes = resolve_sizes(variant, given)
        self.latent_channels, self.patch_size = sizes.in_channels, sizes.patch_size
        self.pooled_dim = sizes.pooled_dim
        self.from_pretrained, self.strict_load = _part_of(from_pretrained), strict_load
        names = {"text": True, "pooled": True, "guidance": sizes.guidance_embeds, "visual": sizes.token_replace}
        self.condition_names = frozenset(name for name, taken in names.items() if taken)
        self.tasks = frozenset({"t2v", "i2v_head"}) if sizes.token_replace else frozenset({"t2v"})

        published = _build_published(sizes)
        self.x_embedder = published.x_embedder
        self.context_embedder = published.context_embedder
        self.time_text_embed = published.time_text_embed
        self.transformer_blocks = published.transformer_blocks
        self.single_transformer_blocks = published.single_transformer_blocks
        self.norm_out = published.norm_out
        self.proj_out = published.proj_out
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            refit_block(block)
        self.set_grad_checkpoint(grad_checkpoint)

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity at `x_BCTHW`.

        Args:
            t_B: [B] in [0, 1], 1 is noise; float32, and kept so up to its embedding.
            conditions: "text" [B, L, text_dim], zero rows are padding; "pooled" [B, pooled_dim]; with
                `guidance_embeds` "guidance" [B], the scale itself (published: 6); with `token_replace` "visual"
                [B, 1 + C, T, H, W]: the mask of the given first frame, then its latents.

        Returns: [B, C, T, H, W] in the dtype of the weights (under autocast, of its linears). Of a given frame it
            means nothing.

        Raises:
            ValueError: conditions that are missing or unknown, shapes that do not fit, a sample without text, a
                given frame that is not the first.
        """
        self._check_inputs(x_BCTHW, conditions)
        dtype = self.proj_out.weight.dtype
        text_BLD, keys_BL = self._text(conditions)
        given_B = None
        if self.sizes.token_replace:
            x_BCTHW, given_B = _with_given(x_BCTHW, conditions["visual"])
        num_frames, height, width = x_BCTHW.shape[2:]
        p = self.patch_size
        time_B, guidance_B = TIMESTEPS * t_B.float(), conditions.get("guidance")
        temb_BD, first_BD = self.time_text_embed(
            time_B,
            conditions["pooled"].to(dtype),
            None if guidance_B is None else TIMESTEPS * guidance_B.float(),
        )
        img_BLD = self.x_embedder(x_BCTHW.to(dtype))
        txt_BLD = self.context_embedder(text_BLD.to(dtype), time_B, keys_BL)
        ids_LA = position_ids(num_frames, height // p, width // p, device=x_BCTHW.device)
        tokens = _Tokens(
            temb_BD,
            None if keys_BL is None else _joint_mask(keys_BL, num_image=img_BLD.shape[1]),
            build_rope(ids_LA, self.sizes.rope_axes_dim, theta=self.sizes.rope_theta, interleaved=True),
            None
            if given_B is None
            else (torch.where(given_B[:, None], first_BD, temb_BD), (height // p) * (width // p)),
        )
        img_BLD = self._run_blocks(img_BLD, txt_BLD, tokens)
        out_BLC = self.proj_out(self.norm_out(img_BLD, temb_BD))
        return unpatchify(out_BLC, p, num_frames=num_frames, height=height, width=width)

    def _text(self, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Text without what is padding in all samples, and which rows are none, [B, L]; None where all are."""
        text_BLD = conditions["text"]
        if text_BLD.is_meta:
            return text_BLD, None
        keys_BL = (text_BLD != 0).any(dim=-1)
        ends_B = (keys_BL * torch.arange(1, keys_BL.shape[1] + 1, device=keys_BL.device)).amax(dim=1)
        visual = conditions.get("visual")
        others = ends_B.new_zeros(()) if visual is None else (visual[:, 0, 1:] != 0).any().to(ends_B.dtype)
        # lengths decide shapes: one read of three numbers by the host
        longest, fewest, others = torch.stack([ends_B.amax(), keys_BL.sum(dim=1).amin(), others]).tolist()
        if fewest == 0:
            raise ValueError(
                "hunyuan_video condition 'text' has a sample of padding alone (all rows are zero); the empty caption"
                " has rows, too: take it from the encoder"
            )
        if others:
            raise ValueError(
                f"hunyuan_video condition 'visual' gives frames behind the first; the model takes {sorted(self.tasks)}"
            )
        return text_BLD[:, :longest], None if fewest == longest else keys_BL[:, :longest]

    def _run_blocks(self, img_BLD: Tensor, txt_BLD: Tensor, tokens: _Tokens) -> Tensor:
        counts = self._num_recomputed if torch.is_grad_enabled() else (0, 0)
        arguments = tokens.arguments()
        for blocks, num_recomputed in zip(
            (self.transformer_blocks, self.single_transformer_blocks), counts, strict=True
        ):
            for i, block in enumerate(blocks):
                if i < num_recomputed:
                    img_BLD, txt_BLD = checkpoint(block, img_BLD, txt_BLD, *arguments, use_reentrant=False)
                else:
                    img_BLD, txt_BLD = block(img_BLD, txt_BLD, *arguments)
        return img_BLD

    def start_of(self, noise_BCTHW: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """What sampling begins with: noise, with a trace of the given frame in all frames of samples that have one.

        Source: diffusers:pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py, prepare_latents.
        """
        if "visual" not in conditions:
            return noise_BCTHW
        visual = conditions["visual"].float()
        frame = visual[:, 1:, :1].expand_as(noise_BCTHW)
        return torch.where(visual[:, :1, :1] > 0, NOISE_SHARE * noise_BCTHW + (1 - NOISE_SHARE) * frame, noise_BCTHW)

    def set_grad_checkpoint(self, settings: Sequence[int] | bool | None) -> None:
        """Which blocks recompute their activations in the backward pass.

        Args:
            settings: (a, b): the first a two-stream and the first b one-stream blocks; True: all; False, None: none.

        Raises:
            ValueError: not two counts of at least 0.
        """
        every = (len(self.transformer_blocks), len(self.single_transformer_blocks))
        self._num_recomputed = recomputed_counts(settings, every, where="model.grad_checkpoint")

    def parallel_plan(self) -> ParallelPlan:
        """How to cut the model.

        `attention` is empty: keys that are padding are told by a mask, which the exchanged attention of sequence
        parallelism does not take. Embedders, modulations and the output stay whole.
        """
        double, single = "transformer_blocks.*", "single_transformer_blocks.*"
        h, m = self.sizes.dim, int(self.sizes.dim * self.sizes.mlp_ratio)
        own = [f"{block}.attn.to_{name}" for block in (double, single) for name in "qkv"]
        added = [f"{double}.attn.add_{name}_proj" for name in "qkv"]
        norms = [f"{block}.attn.norm_{name}.weight" for block in (double, single) for name in "qk"]
        row = {f"{double}.attn.to_out.0": (), f"{double}.attn.to_add_out": (), f"{single}.proj_out": (h, m)}
        return ParallelPlan(
            blocks=(double, single),
            column=dict.fromkeys(
                [*own, *added, f"{double}.ff.net.0.proj", f"{double}.ff_context.net.0.proj", f"{single}.proj_mlp"], ()
            ),
            row=row | {f"{double}.ff.net.2": (), f"{double}.ff_context.net.2": ()},
            head_counts=(f"{double}.attn.heads", f"{single}.attn.heads"),
            per_head=(*norms, *(f"{double}.attn.norm_added_{name}.weight" for name in "qk")),
        )

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Published weights of either layout under this model's names; see `convert.to_diffusers`."""
        if not convert.is_original(weights):
            return dict(weights), []
        return convert.to_diffusers(weights, dim=self.sizes.dim), [
            f"{len(weights)} tensors renamed, and fused projections split, as diffusers has them"
        ]

    def _check_inputs(self, x_BCTHW: Tensor, conditions: Mapping[str, Tensor]) -> None:
        missing, unknown = self.condition_names - conditions.keys(), conditions.keys() - self.condition_names
        if missing or unknown:
            raise ValueError(
                f"hunyuan_video conditions: missing {sorted(missing)}, unknown {sorted(unknown)}; with guidance_embeds="
                f"{self.sizes.guidance_embeds}, token_replace={self.sizes.token_replace} give exactly"
                f" {sorted(self.condition_names)}"
            )
        c, p, b = self.latent_channels, self.patch_size, len(x_BCTHW)
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != c or x_BCTHW.shape[3] % p or x_BCTHW.shape[4] % p:
            raise ValueError(
                f"hunyuan_video input of shape {tuple(x_BCTHW.shape)}: [B, {c}, T, H, W] with H and W multiples of {p}"
                " is needed"
            )
        wanted = {"pooled": (b, self.sizes.pooled_dim), "visual": (b, 1 + c, *x_BCTHW.shape[2:])}
        wanted["text"] = (b, conditions["text"].shape[1] if conditions["text"].ndim == 3 else 0, self.sizes.text_dim)
        for name, shape in wanted.items():
            if name in conditions and tuple(conditions[name].shape) != shape:
                raise ValueError(
                    f"hunyuan_video condition {name!r} has shape {tuple(conditions[name].shape)}, {shape} is needed"
                )


def _part_of(source: str | None) -> str | None:
    """The folder of the weights: of a pipeline's folder, the part that is this model."""
    part = None if source is None else Path(source) / "transformer"
    return str(part) if part is not None and part.is_dir() else source


def _build_published(sizes: HunyuanSizes) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=sizes.in_channels,
        out_channels=sizes.in_channels,
        num_attention_heads=sizes.num_attention_heads,
        attention_head_dim=sizes.attention_head_dim,
        num_layers=sizes.num_layers,
        num_single_layers=sizes.num_single_layers,
        num_refiner_layers=sizes.num_refiner_layers,
        mlp_ratio=sizes.mlp_ratio,
        patch_size=sizes.patch_size,
        guidance_embeds=sizes.guidance_embeds,
        text_embed_dim=sizes.text_dim,
        pooled_projection_dim=sizes.pooled_dim,
        rope_theta=sizes.rope_theta,
        rope_axes_dim=sizes.rope_axes_dim,
        image_condition_type="token_replace" if sizes.token_replace else None,
    )


def _with_given(x_BCTHW: Tensor, visual_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Latents with the given ones in their places, and of which samples the first frame is given, bool [B]."""
    mask, latents = visual_BCTHW[:, :1] > 0, visual_BCTHW[:, 1:]
    return torch.where(mask, latents.to(x_BCTHW.dtype), x_BCTHW), mask[:, 0, 0, 0, 0]


def _joint_mask(keys_BL: Tensor, *, num_image: int) -> Tensor:
    """Which of all keys are attended to: latents, then text. Returns: bool [B, 1, 1, L]."""
    image = keys_BL.new_ones(len(keys_BL), num_image)
    return torch.cat([image, keys_BL], dim=1)[:, None, None]
