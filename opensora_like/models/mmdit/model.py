"""The MMDiT denoiser of FLUX and Open-Sora v2, for images and videos, with text and visual conditions.

Letters of the shape suffixes: B batch, C channels, T time, H W space, L tokens, D width, A axes of a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_like.models.base import ParallelPlan
from opensora_like.models.layers import MLPEmbedder, Rope, SequenceCut, build_rope, time_embedding
from opensora_like.models.mmdit.adapt import adapt
from opensora_like.models.mmdit.blocks import DoubleBlock, FinalLayer, SingleBlock
from opensora_like.models.recomputation import recomputed_counts
from opensora_like.models.tokens import patchify, position_ids, unpatchify
from opensora_like.registry import MODELS

TIME_DIM = 256


@MODELS.register_module(["mmdit", "flux"])
class MMDiT(nn.Module):
    """A transformer over text and latent tokens that predicts the velocity; a `Denoiser`.

    Weights start as torch's defaults do, but `cond_in` starts at zero, so that a model given visual conditions
    begins as the text-to-video model it was loaded from.

    Args:
        in_channels: of a token: latent channels times `patch_size` squared (64 = 16 * 2 * 2).
        vec_in_dim, context_in_dim: widths of the pooled and of the token text embeddings.
        mlp_ratio: inner width of the MLPs over `hidden_size`.
        depth, depth_single_blocks: how many two-stream and one-stream blocks.
        axes_dim: how a head's width is shared among positions in t, h and w.
        theta: base of the rotary frequencies.
        guidance_embed: take a guidance scale as input (distilled models).
        cond_embed: take given frames as input.
        fused_qkv: one linear for queries, keys and values, as in FLUX; Open-Sora v2 has three.
        use_liger_rope: rotate the pairs (i, i + D / 2) instead of (2i, 2i + 1); `convert` permutes weights.
        grad_ckpt_settings, grad_ckpt_setting: one argument, two spellings; see `set_grad_checkpoint`.
        from_pretrained, cache_dir, strict_load: where weights come from. Kept as attributes for the program
            that loads them; nothing is read here.

    Raises:
        ValueError: sizes that do not fit each other.

    Source: Open-Sora v2 (arXiv:2503.09642) section 3; hpcaitech/Open-Sora:opensora/models/mmdit.
    """

    def __init__(
        self,
        in_channels: int,
        vec_in_dim: int,
        *,
        context_in_dim: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        depth_single_blocks: int,
        axes_dim: tuple[int, ...],
        mlp_ratio: float = 4.0,
        theta: float = 10000.0,
        qkv_bias: bool = True,
        guidance_embed: bool = False,
        cond_embed: bool = False,
        fused_qkv: bool = True,
        use_liger_rope: bool = False,
        patch_size: int = 2,
        grad_ckpt_settings: tuple[int, int] | bool | None = None,
        grad_ckpt_setting: tuple[int, int] | bool | None = None,
        from_pretrained: str | None = None,
        cache_dir: str | None = None,
        strict_load: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, patch_size, hidden_size, num_heads, axes_dim)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.latent_channels = in_channels // patch_size**2
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.mlp_hidden_size = int(hidden_size * mlp_ratio)
        self.axes_dim, self.theta, self.use_liger_rope = tuple(axes_dim), theta, use_liger_rope
        self.guidance_embed, self.cond_embed, self.fused_qkv = guidance_embed, cond_embed, fused_qkv
        self.from_pretrained, self.cache_dir, self.strict_load = from_pretrained, cache_dir, strict_load
        names = {"text": True, "pooled": True, "guidance": guidance_embed, "visual": cond_embed}
        self.condition_names = frozenset(name for name, taken in names.items() if taken)
        self.sequence_cut: SequenceCut | None = None  # set by sequence parallelism

        self.img_in = nn.Linear(in_channels, hidden_size)
        self.time_in = MLPEmbedder(TIME_DIM, hidden_size)
        self.vector_in = MLPEmbedder(vec_in_dim, hidden_size)
        if guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_DIM, hidden_size)
        if cond_embed:
            self.cond_in = nn.Linear(in_channels + patch_size**2, hidden_size)
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        common = {"num_heads": num_heads, "mlp_hidden_size": self.mlp_hidden_size, "fused_qkv": fused_qkv}
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden_size, qkv_bias=qkv_bias, **common) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden_size, **common) for _ in range(depth_single_blocks))
        self.final_layer = FinalLayer(hidden_size, out_channels=in_channels)
        self.set_grad_checkpoint(_one_of(grad_ckpt_settings, grad_ckpt_setting))

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity at `x_BCTHW`.

        Args:
            t_B: [B] in [0, 1], 1 is noise; float32, and kept so up to its embedding.
            conditions: "text" [B, L, context_in_dim]; "pooled" [B, vec_in_dim]; with `guidance_embed` "guidance"
                [B]; with `cond_embed` "visual" [B, 1 + C, T, H, W], the mask first.

        Returns: [B, C, T, H, W] in the dtype of the weights (under autocast, of its linears).

        Raises:
            ValueError: conditions that are missing or unknown, shapes that do not fit.
        """
        self._check_inputs(x_BCTHW, conditions)
        _, _, num_frames, height, width = x_BCTHW.shape
        p = self.patch_size
        visual = conditions.get("visual")
        out_BLC = self.forward_tokens(
            patchify(x_BCTHW, p),
            t_B,
            img_ids_LA=position_ids(num_frames, height // p, width // p, device=x_BCTHW.device),
            txt_BLD=conditions["text"],
            pooled_BD=conditions["pooled"],
            guidance_B=conditions.get("guidance"),
            visual_BLC=None if visual is None else patchify(visual, p),
        )
        return unpatchify(out_BLC, p, num_frames=num_frames, height=height, width=width)

    def forward_tokens(
        self,
        img_BLC: Tensor,
        t_B: Tensor,
        *,
        img_ids_LA: Tensor,
        txt_BLD: Tensor,
        pooled_BD: Tensor,
        guidance_B: Tensor | None = None,
        visual_BLC: Tensor | None = None,
    ) -> Tensor:
        """`forward` on packed tokens.

        Args:
            img_ids_LA: [L, 3], positions in t, h, w, the same for every sample. Text sits at (0, 0, 0).
            visual_BLC: [B, L, in_channels + patch_size ** 2].

        Returns: [B, L, in_channels].
        """
        dtype = self.img_in.weight.dtype
        img_BLD = self.img_in(img_BLC.to(dtype))
        if visual_BLC is not None:
            img_BLD = img_BLD + self.cond_in(visual_BLC.to(dtype))
        vec_BD = self.time_in(time_embedding(t_B, TIME_DIM).to(dtype))
        if guidance_B is not None:
            vec_BD = vec_BD + self.guidance_in(time_embedding(guidance_B, TIME_DIM).to(dtype))
        vec_BD = vec_BD + self.vector_in(pooled_BD.to(dtype))
        txt_BLD = self.txt_in(txt_BLD.to(dtype))

        rope = self._rope(img_ids_LA, num_text=txt_BLD.shape[1])
        if self.sequence_cut is not None:
            txt_BLD, img_BLD, rope = self.sequence_cut.cut(txt_BLD, img_BLD, rope)
        img_BLD = self._run_blocks(img_BLD, txt_BLD, vec_BD, rope)
        out_BLC = self.final_layer(img_BLD, vec_BD)
        return out_BLC if self.sequence_cut is None else self.sequence_cut.join(out_BLC)

    def _rope(self, img_ids_LA: Tensor, *, num_text: int) -> Rope:
        # built in every forward: a table per (shape, device) would grow with the buckets, and costs little to make
        txt_ids_LA = img_ids_LA.new_zeros(num_text, img_ids_LA.shape[1])
        ids_LA = torch.cat([txt_ids_LA, img_ids_LA])
        return build_rope(ids_LA, self.axes_dim, theta=self.theta, interleaved=not self.use_liger_rope)

    def _run_blocks(self, img_BLD: Tensor, txt_BLD: Tensor, vec_BD: Tensor, rope: Rope) -> Tensor:
        num_double, num_single = self._num_recomputed if torch.is_grad_enabled() else (0, 0)
        for i, block in enumerate(self.double_blocks):
            run = _recomputed if i < num_double else _kept
            img_BLD, txt_BLD = run(block, img_BLD, txt_BLD, vec_BD, rope)
        num_text = txt_BLD.shape[1]
        x_BLD = torch.cat([txt_BLD, img_BLD], dim=1)
        for i, block in enumerate(self.single_blocks):
            run = _recomputed if i < num_single else _kept
            x_BLD = run(block, x_BLD, vec_BD, rope)
        return x_BLD[:, num_text:]

    def set_grad_checkpoint(self, settings: Sequence[int] | bool | None) -> None:
        """Which blocks recompute their activations in the backward pass.

        Args:
            settings: (a, b): the first a two-stream and the first b one-stream blocks; True: all; False, None: none.

        Raises:
            ValueError: not two counts of at least 0.
        """
        every = (len(self.double_blocks), len(self.single_blocks))
        self._num_recomputed = recomputed_counts(settings, every, where="model.grad_ckpt_settings")

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Published weights in the layout of this model's options; see `adapt.adapt`."""
        return adapt(weights, self)

    def parallel_plan(self) -> ParallelPlan:
        """How to cut the model; valid for the layout of qkv that was built."""
        h, m = self.hidden_size, self.mlp_hidden_size
        column: dict[str, tuple[int, ...]] = {}
        row: dict[str, tuple[int, ...]] = {"single_blocks.*.linear2": (h, m)}
        for stream in ("double_blocks.*.img", "double_blocks.*.txt"):
            column |= {f"{stream}_attn.{n}": cut for n, cut in self._qkv_cuts().items()} | {f"{stream}_mlp.0": ()}
            row |= {f"{stream}_attn.proj": (), f"{stream}_mlp.2": ()}
        single = {"linear1": (h, h, h, m)} if self.fused_qkv else {"q_proj": (), "k_proj": (), "v_mlp": (h, m)}
        column |= {f"single_blocks.*.{name}": cut for name, cut in single.items()}
        streams = {"double_blocks.*.img": "image", "double_blocks.*.txt": "text", "single_blocks": "joint"}
        holders = ("double_blocks.*.img_attn", "double_blocks.*.txt_attn", "single_blocks.*")
        return ParallelPlan(
            blocks=("double_blocks.*", "single_blocks.*"),
            attention=("double_blocks.*.attention", "single_blocks.*.attention"),
            column=column,
            row=row,
            head_counts=tuple(f"{holder}.num_heads" for holder in holders),
            per_head=tuple(f"{holder}.norm.{n}_norm.scale" for holder in holders for n in ("query", "key")),
            token_streams={n: s for start, s in streams.items() for n in (*column, *row) if n.startswith(start)},
        )

    def _qkv_cuts(self) -> dict[str, tuple[int, ...]]:
        if self.fused_qkv:
            return {"qkv": (self.hidden_size,) * 3}
        return {"q_proj": (), "k_proj": (), "v_proj": ()}

    def _check_inputs(self, x_BCTHW: Tensor, conditions: dict[str, Tensor]) -> None:
        missing, unknown = self.condition_names - conditions.keys(), conditions.keys() - self.condition_names
        if missing or unknown:
            raise ValueError(
                f"mmdit conditions: missing {sorted(missing)}, unknown {sorted(unknown)}; with guidance_embed="
                f"{self.guidance_embed}, cond_embed={self.cond_embed} give exactly {sorted(self.condition_names)}"
            )
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != self.latent_channels:
            raise ValueError(
                f"mmdit input of shape {tuple(x_BCTHW.shape)}: [B, {self.latent_channels}, T, H, W] is needed,"
                f" since model.in_channels={self.in_channels} and patch_size={self.patch_size}"
            )
        want = (len(x_BCTHW), 1 + self.latent_channels, *x_BCTHW.shape[2:])
        if self.cond_embed and tuple(conditions["visual"].shape) != want:
            raise ValueError(
                f"mmdit condition 'visual' has shape {tuple(conditions['visual'].shape)}, {want} is needed: the mask"
                " of given frames, then their latents"
            )


def _kept(block: nn.Module, *args: Tensor | Rope) -> Tensor | tuple[Tensor, ...]:
    return block(*args)


def _recomputed(block: nn.Module, *args: Tensor | Rope) -> Tensor | tuple[Tensor, ...]:
    return checkpoint(block, *args, use_reentrant=False)


def _one_of(settings: object, setting: object) -> object:
    """The one of two spellings that was given."""
    if settings is not None and setting is not None and settings != setting:
        raise ValueError(
            f"model.grad_ckpt_settings={settings!r} and model.grad_ckpt_setting={setting!r} are the same argument and"
            " differ; give one"
        )
    return setting if settings is None else settings


def _check_sizes(in_channels: int, patch_size: int, hidden_size: int, num_heads: int, axes_dim: Sequence[int]) -> None:
    if patch_size < 1 or in_channels % patch_size**2:
        raise ValueError(
            f"model.in_channels={in_channels} must be a multiple of patch_size ** 2 = {patch_size**2}"
            f" (model.patch_size={patch_size}): latent channels times the pixels of a patch"
        )
    if hidden_size % num_heads:
        raise ValueError(f"model.hidden_size={hidden_size} does not divide by model.num_heads={num_heads}")
    if len(axes_dim) != 3 or any(dim % 2 for dim in axes_dim):
        raise ValueError(f"model.axes_dim={tuple(axes_dim)} must be three even numbers, for t, h and w")
    if sum(axes_dim) != hidden_size // num_heads:
        raise ValueError(
            f"model.axes_dim={tuple(axes_dim)} adds up to {sum(axes_dim)}, but a head is hidden_size / num_heads ="
            f" {hidden_size} / {num_heads} = {hidden_size // num_heads} wide; make them equal"
        )
