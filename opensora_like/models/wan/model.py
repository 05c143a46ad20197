"""The denoiser of Wan 2.1 (arXiv:2503.20314) and of each expert of Wan 2.2, on the blocks of diffusers.

Letters of the shape suffixes: B batch, C channels, T time, H W space, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_like.models.base import ParallelPlan
from opensora_like.models.layers import Rope, SequenceCut, build_rope, time_embedding
from opensora_like.models.tokens import position_ids
from opensora_like.models.wan import convert
from opensora_like.models.wan.blocks import Context, refit_block, refit_embedder
from opensora_like.models.wan.config import Variant, WanSizes, resolve_sizes
from opensora_like.registry import MODELS

THETA = 10000.0
QK_NORM = "rms_norm_across_heads"  # diffusers' word for the norm of queries and keys
TIMESTEPS = 1000.0  # what t = 1 is to the time embedding


@MODELS.register_module("wan")
class Wan(nn.Module):
    """A transformer over latent tokens with cross-attention to text, and to an image in i2v; a `Denoiser`.

    Embedders, blocks and output layers are those of diffusers' ``WanTransformer3DModel``, and so are the names of the
    weights. Exchanged are: attention (`layers.Attention`), norms of queries and keys, rotary tables (made in every
    forward, any length), and the path from t to the modulation, which runs in float32 whatever the weights are.

    With `in_channels` above `out_channels` (i2v) the condition "visual" is put beside the latents. Wan marks the four
    frames of a latent frame with four mask channels; the mask of the house has one per latent frame and is repeated:
    the same for given heads. A visual condition with all channels (``in_channels - out_channels``: Wan's own "y") is
    taken as it is. Published i2v weights have seen, behind the given frames, the latents of a grey clip; see `ungiven`.

    Args:
        variant: sizes of a published model: "t2v-1.3B", "t2v-14B", "i2v-14B" of Wan 2.1, "t2v-A14B" and "i2v-A14B"
            of the experts of Wan 2.2, "ti2v-5B" of its small model.
        config: instead: the ``config.json`` of diffusers or of the original code, or its folder.
        num_attention_heads, attention_head_dim, ffn_dim, num_layers, in_channels, out_channels, text_dim, freq_dim,
            image_dim, cross_attn_norm: in place of those sizes; without them the first four are needed.
        text_length: text tokens that the cross-attention sees: shorter text is filled with zeros, which it does
            attend to; published models have seen 512. None takes any length as it is.
        ungiven: what the condition "visual" is meant to hold where no frame is given: "grey" (also None), the latents
            of a grey clip and Wan's own mask (`conditioning.wan_i2v`), which published i2v weights need, or "zero",
            as other models of this program have it. `forward` does not depend on it.
        token_replace: given latents of the condition "visual" stand in the place of the noisy ones, and their tokens
            are told t = 0 (TI2V-5B of Wan 2.2); for a model whose `in_channels` are those of the latents.
        grad_checkpoint: see `set_grad_checkpoint`.
        from_pretrained, cache_dir, strict_load: where weights come from. Kept as attributes for the program
            that loads them; nothing is read here.

    Raises:
        ValueError: sizes that are missing, given twice or do not fit each other.
        FileNotFoundError: no file at `config`.

    Source: Wan, arXiv:2503.20314, section 4.2; Wan-Video/Wan2.1:wan/modules/model.py.
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
        token_replace: bool = False,
        grad_checkpoint: int | bool = False,
        from_pretrained: str | None = None,
        cache_dir: str | None = None,
        strict_load: bool = True,
    ) -> None:
        super().__init__()
        given = {
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "ffn_dim": ffn_dim,
            "num_layers": num_layers,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "text_dim": text_dim,
            "freq_dim": freq_dim,
            "image_dim": image_dim,
            "cross_attn_norm": cross_attn_norm,
        }
        self.sizes = sizes = resolve_sizes(variant, config, given)
        self.text_length = _check_text_length(text_length)
        self.latent_channels, self.patch_size = sizes.out_channels, sizes.patch_size[1]
        self.from_pretrained, self.cache_dir, self.strict_load = from_pretrained, cache_dir, strict_load
        self.num_visual_channels = sizes.in_channels - sizes.out_channels
        self.token_replace = _check_token_replace(token_replace, self.num_visual_channels)
        self.ungiven = "zero" if token_replace else _check_ungiven(ungiven, self.num_visual_channels)
        takes_visual = token_replace or self.num_visual_channels > 0
        names = {"text": True, "visual": takes_visual, "image_embeds": sizes.image_dim is not None}
        self.condition_names = frozenset(name for name, taken in names.items() if taken)
        self.sequence_cut: SequenceCut | None = None  # set by sequence parallelism

        published = _build_published(sizes)
        self.patch_embedding = published.patch_embedding
        self.condition_embedder = published.condition_embedder
        self.blocks = published.blocks
        self.norm_out = published.norm_out
        self.proj_out = published.proj_out
        self.scale_shift_table = published.scale_shift_table
        refit_embedder(self.condition_embedder)
        for block in self.blocks:
            refit_block(block, eps=sizes.eps)
        self.set_grad_checkpoint(grad_checkpoint)

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity at `x_BCTHW`.

        Args:
            t_B: [B] in [0, 1], 1 is noise; float32, and kept so up to the modulation.
            conditions: "text" [B, L, text_dim], zero beyond each caption's end; in i2v "visual" [B, 1 + C, T, H, W]
                or [B, in_channels - C, T, H, W], mask first, and with `image_dim` "image_embeds" [B, N, image_dim];
                with `token_replace` "visual" [B, 1 + C, T, H, W].

        Returns: [B, C, T, H, W] in the dtype of the weights (under autocast, of its linears).

        Raises:
            ValueError: conditions that are missing or unknown, shapes that do not fit.
        """
        self._check_inputs(x_BCTHW, conditions)
        dtype = self.patch_embedding.weight.dtype
        if self.token_replace:
            x_BCTHW, t_B = _replace_given(x_BCTHW, t_B, conditions["visual"])
        elif self.num_visual_channels:
            x_BCTHW = torch.cat([x_BCTHW.to(dtype), self._visual(conditions["visual"]).to(dtype)], dim=1)
        num_frames, height, width = x_BCTHW.shape[2:]
        img_BLD = self.patch_embedding(x_BCTHW.to(dtype)).flatten(2).transpose(1, 2).contiguous()
        temb_BD, modulation_B6D = self._embed_time(t_B)

        p = self.patch_size
        ids_LA = position_ids(num_frames, height // p, width // p, device=x_BCTHW.device)
        rope = build_rope(ids_LA, self.sizes.axes_dim, theta=THETA, interleaved=True)
        if self.sequence_cut is not None:
            no_text, ids_1LA = img_BLD[:, :0], ids_LA[None]
            ids_LA = self.sequence_cut.cut(no_text, ids_1LA, rope)[1][0]
            _, img_BLD, rope = self.sequence_cut.cut(no_text, img_BLD, rope)  # text is no part of the sequence
        if self.token_replace:  # from frames to this rank's tokens
            frame_L = ids_LA[:, 0].long()
            temb_BD, modulation_B6D = temb_BD[:, frame_L], modulation_B6D[:, frame_L]
        context = self._embed_context(conditions, ids_LA, num_frames)
        img_BLD = self._run_blocks(img_BLD, context, modulation_B6D, rope)
        out_BLC = self._project_out(img_BLD, temb_BD)
        if self.sequence_cut is not None:
            out_BLC = self.sequence_cut.join(out_BLC)
        return _unpatchify(out_BLC, p, num_frames=num_frames, height=height, width=width)

    def _visual(self, visual_BCTHW: Tensor) -> Tensor:
        """The visual condition with all of its mask channels."""
        num_masks = self.num_visual_channels - self.latent_channels
        if visual_BCTHW.shape[1] == self.num_visual_channels:
            return visual_BCTHW
        mask, latents = visual_BCTHW.split([1, self.latent_channels], dim=1)
        return torch.cat([mask.expand(-1, num_masks, -1, -1, -1), latents], dim=1)

    def _embed_time(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns: [B, D] for the output layer and [B, 6, D] for the blocks, both float32; of t [B, T], [B, T, ...]."""
        embedder = self.condition_embedder
        waves = time_embedding(t_B.flatten(), self.sizes.freq_dim, factor=TIMESTEPS)
        temb_BD = embedder.time_embedder(waves).unflatten(0, t_B.shape)
        return temb_BD, embedder.time_proj(embedder.act_fn(temb_BD)).unflatten(-1, (6, -1))

    def _embed_context(self, conditions: Mapping[str, Tensor], ids_LA: Tensor, num_frames: int) -> Context:
        """What the cross-attention sees.

        Args:
            ids_LA: latent frame, row and column of this rank's tokens; text and image are the same for all of them.
            num_frames: latent frames of the whole video.
        """
        embedder, dtype = self.condition_embedder, self.patch_embedding.weight.dtype
        text_BLD = conditions["text"].to(dtype)
        if self.text_length is not None:
            text_BLD = F.pad(text_BLD, (0, 0, 0, self.text_length - text_BLD.shape[1]))
        image_BLD = None
        if self.sizes.image_dim is not None:
            image_BLD = embedder.image_embedder(conditions["image_embeds"].to(dtype))
        return Context(embedder.text_embedder(text_BLD), image_BLD)

    def _run_blocks(self, img_BLD: Tensor, context: Context, modulation_B6D: Tensor, rope: Rope) -> Tensor:
        num_recomputed = self._num_recomputed if torch.is_grad_enabled() else 0
        for i, block in enumerate(self.blocks):
            if i < num_recomputed:
                img_BLD = checkpoint(block, img_BLD, context, modulation_B6D, rope, use_reentrant=False)
            else:
                img_BLD = block(img_BLD, context, modulation_B6D, rope)
        return img_BLD

    def _project_out(self, img_BLD: Tensor, temb_BD: Tensor) -> Tensor:
        temb_BLD = temb_BD if temb_BD.ndim == 3 else temb_BD[:, None]
        shift, scale = (self.scale_shift_table.float() + temb_BLD[:, :, None]).unbind(2)
        return self.proj_out((self.norm_out(img_BLD.float()) * (1 + scale) + shift).to(img_BLD.dtype))

    def set_grad_checkpoint(self, settings: Sequence[int] | int | bool | None) -> None:
        """How many blocks, from the first, recompute their activations in the backward pass.

        Args:
            settings: a count (alone, or as the one entry of a list); True: all; False, None: none.

        Raises:
            ValueError: not one count of at least 0.
        """
        if settings is None or isinstance(settings, bool):
            self._num_recomputed = len(self.blocks) if settings else 0
            return
        counts = [settings] if isinstance(settings, int) else list(settings)
        if len(counts) != 1 or not isinstance(counts[0], int) or counts[0] < 0:
            raise ValueError(f"model.grad_checkpoint={settings!r} must be one count >= 0 of blocks, True or False")
        self._num_recomputed = counts[0]

    def parallel_plan(self) -> ParallelPlan:
        """How to cut the model.

        The embedders, `time_proj` and `proj_out` stay whole: each block needs all of the modulation, and what they
        cost is little. Cross-attention has no place in `attention`: its queries are a rank's own tokens, its keys
        are whole, and under tensor parallelism `heads` is all it has to know.
        """
        column = {f"blocks.*.{attn}.to_{name}": () for attn in ("attn1", "attn2") for name in "qkv"}
        norms = [f"blocks.*.{attn}.norm_{name}" for attn in ("attn1", "attn2") for name in "qk"]
        if self.sizes.image_dim is not None:
            column |= {f"blocks.*.attn2.add_{name}_proj": () for name in "kv"}
            norms.append("blocks.*.attn2.norm_added_k")
        own = [f"blocks.*.{n}" for n in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj")]
        row = {"blocks.*.attn1.to_out.0": (), "blocks.*.attn2.to_out.0": (), "blocks.*.ffn.net.2": ()}
        return ParallelPlan(
            blocks=("blocks.*",),
            attention=("blocks.*.attn1.attention",),
            column=column | {"blocks.*.ffn.net.0.proj": ()},
            row=row,
            head_counts=("blocks.*.attn1.heads", "blocks.*.attn2.heads"),
            split_norms=tuple(norms),
            token_streams=dict.fromkeys([*own, *row], "image"),
        )

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Published weights of either layout under this model's names; see `convert.to_diffusers`."""
        own = convert.to_diffusers(weights)
        return own, [] if own.keys() == weights.keys() else [f"{len(weights)} tensors renamed as diffusers names them"]

    def diffusers_config(self) -> dict[str, Any] | None:
        """What diffusers reads beside exported weights, whose names are its own; None for a model that adds to them."""
        if type(self) is not Wan:
            return None
        return {"_class_name": "WanTransformer3DModel", "qk_norm": QK_NORM, **_published_arguments(self.sizes)}

    def other_name(self, module: str) -> str:
        """The name of a module in the layout of the original code, which files of adapters are written in."""
        return convert.to_original_name(module)

    def _check_inputs(self, x_BCTHW: Tensor, conditions: Mapping[str, Tensor]) -> None:
        missing, unknown = self.condition_names - conditions.keys(), conditions.keys() - self.condition_names
        if missing or unknown:
            raise ValueError(
                f"wan conditions: missing {sorted(missing)}, unknown {sorted(unknown)}; with"
                f" in_channels={self.sizes.in_channels}, image_dim={self.sizes.image_dim} give exactly"
                f" {sorted(self.condition_names)}"
            )
        c, p = self.latent_channels, self.patch_size
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != c or x_BCTHW.shape[3] % p or x_BCTHW.shape[4] % p:
            raise ValueError(
                f"wan input of shape {tuple(x_BCTHW.shape)}: [B, {c}, T, H, W] with H and W multiples of {p} is needed"
            )
        text = conditions["text"]
        most = self.text_length if self.text_length is not None else text.shape[1]
        if text.ndim != 3 or text.shape[2] != self.sizes.text_dim or text.shape[1] > most:
            raise ValueError(
                f"wan condition 'text' has shape {tuple(text.shape)}, [B, L <= {most}, {self.sizes.text_dim}] is"
                " needed; L is model.text_length at most"
            )
        if "visual" in self.condition_names:
            self._check_visual(x_BCTHW, conditions["visual"])

    def _check_visual(self, x_BCTHW: Tensor, visual_BCTHW: Tensor) -> None:
        counts = (1 + self.latent_channels, self.num_visual_channels or 1 + self.latent_channels)
        found = tuple(visual_BCTHW.shape)
        if not any(found == (len(x_BCTHW), count, *x_BCTHW.shape[2:]) for count in counts):
            raise ValueError(
                f"wan condition 'visual' has shape {found}, [{len(x_BCTHW)}, {counts[0]} or {counts[1]},"
                f" {', '.join(map(str, x_BCTHW.shape[2:]))}] is needed: the mask of given frames, then their latents"
            )


def _check_ungiven(ungiven: str | None, num_visual_channels: int) -> str:
    if ungiven is not None and not num_visual_channels:
        raise ValueError(f"model.ungiven={ungiven!r} is about given frames, and this model takes none; remove it")
    return ungiven or "grey"


def _check_text_length(text_length: int | None) -> int | None:
    if text_length is not None and text_length < 1:
        raise ValueError(f"model.text_length={text_length} must be 1 or more, or None for any")
    return text_length


def _check_token_replace(token_replace: bool, num_visual_channels: int) -> bool:
    if token_replace and num_visual_channels:
        raise ValueError(
            f"model.token_replace=True is for models without channels for given frames, and this one has "
            f"{num_visual_channels}; remove it"
        )
    return token_replace


def _replace_given(x_BCTHW: Tensor, t_B: Tensor, visual_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Given latents in the place of noisy ones. Returns: these, and t [B, T], 0 where a frame is given."""
    is_given = visual_BCTHW[:, :1] > 0.5
    x_BCTHW = torch.where(is_given, visual_BCTHW[:, 1:].to(x_BCTHW.dtype), x_BCTHW)
    return x_BCTHW, torch.where(is_given[:, 0, :, 0, 0], 0.0, t_B[:, None])


def _build_published(sizes: WanSizes) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_published_arguments(sizes))


def _published_arguments(sizes: WanSizes) -> dict[str, Any]:
    """Of diffusers' ``WanTransformer3DModel``."""
    return asdict(sizes) | {"added_kv_proj_dim": None if sizes.image_dim is None else sizes.dim}


def _unpatchify(x_BLC: Tensor, p: int, *, num_frames: int, height: int, width: int) -> Tensor:
    """Tokens to latents: "b (t h w) (p q c) -> b c t (h p) (w q)"."""
    x = x_BLC.unflatten(2, (p, p, -1)).unflatten(1, (num_frames, height // p, width // p))
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x_BLC), -1, num_frames, height, width)
