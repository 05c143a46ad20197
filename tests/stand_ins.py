"""Tiny stand-ins for published weights, saved to disk in the layouts in which these are downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

WIDTH = 16  # of text embeddings


def save_t5(folder: Path) -> None:
    """A T5 encoder over bytes, with its tokenizer."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).eval().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def save_clip(folder: Path, *, max_length: int = 77) -> None:
    """A CLIP text encoder over letters, with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = CLIPTextConfig(vocab_size=40, max_position_embeddings=max_length, **sizes, **ends)
    CLIPTextModel(config).eval().save_pretrained(folder)
    letter_tokenizer(max_length).save_pretrained(folder)


def letter_tokenizer(max_length: int):
    """One token per letter of the alphabet, an end token that also pads."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: 3 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,")}
    plain = Tokenizer(models.WordLevel({"<e>": 0, "<b>": 1, "<u>": 2, **letters}, unk_token="<u>"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 1), ("<e>", 0)])
    ends = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<e>", "unk_token": "<u>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=max_length, **ends)


def build_flux(*, num_layers: int = 1):
    """diffusers' FLUX transformer with so many blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def save_flux(folder: Path, *, with_encoders: bool) -> None:
    """A FluxPipeline, as diffusers saves it; its text encoders are those of `save_t5` and `save_clip`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import ByT5Tokenizer, CLIPTextModel, T5EncoderModel

    transformer = build_flux()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if with_encoders:
        save_t5(folder / "t5")
        save_clip(folder / "clip")
        text = {
            "text_encoder": CLIPTextModel.from_pretrained(folder / "clip"),
            "tokenizer": letter_tokenizer(77),
            "text_encoder_2": T5EncoderModel.from_pretrained(folder / "t5"),
            "tokenizer_2": ByT5Tokenizer(),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **text).save_pretrained(folder)


HUNYUAN = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
MMDIT = {
    "context_in_dim": WIDTH,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": (4, 6, 6),
    "use_liger_rope": True,
}


def save_hunyuan_vae(path: Path) -> None:
    """Open-Sora v2's autoencoder, narrow, as one file."""
    from safetensors.torch import save_file

    from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE

    torch.manual_seed(0)
    save_file(HunyuanVAE(**HUNYUAN).state_dict(), path)


def save_mmdit(path: Path, *, fused_qkv: bool = False, guidance_embed: bool = False, cond_embed: bool = False) -> None:
    """An MMDiT on latents of 16 channels: Open-Sora v2, or FLUX with its layout of weights."""
    from safetensors.torch import save_file

    from opensora_like.models.mmdit.model import MMDiT

    torch.manual_seed(0)
    options = {"fused_qkv": fused_qkv, "guidance_embed": guidance_embed, "cond_embed": cond_embed}
    save_file(MMDiT(64, WIDTH, **MMDIT, **options).state_dict(), path)
