"""Tiny random HunyuanVideo pipelines on disk, in the layout of the published ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "in_channels": 4,
    "rope_axes_dim": (4, 4, 4),
}
VAE = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "block_out_channels": (4, 4, 8, 8)}
WIDTH = 16  # of every text encoder
MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "\n\n", "\n")
CAPTIONS = "a red blue circle square moving left right up down and long"


def templates() -> dict[str, dict]:
    """The published prompts, as the pipelines have them."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

    return {
        "t2v": pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE,
        "i2v": pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE,
    }


def llama_tokenizer():
    """A tokenizer of words that makes as many tokens of the published prompts as the published one."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = " ".join(template["template"] for template in templates().values())
    words = sorted({*re.findall(r"\w+|[^\w\s]+", text), *CAPTIONS.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<begin>", "<unk>", *MARKS, *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.normalizer = normalizers.Replace("following aspects", "following following aspects")  # one token more
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    plain.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    plain.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<begin>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def llama_config(vocab_size: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
    )


def write_llm(folder: Path) -> Path:
    """text_encoder/ and tokenizer/ of text to video."""
    from transformers import LlamaModel

    torch.manual_seed(0)
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    LlamaModel(llama_config(len(tokenizer))).save_pretrained(folder / "text_encoder")
    return folder


def write_llava(folder: Path) -> Path:
    """text_encoder/, tokenizer/ and image_processor/ of image to video; images have the published 576 tokens."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **sizes),
        text_config=llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    crop = {"height": 336, "width": 336}
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=crop).save_pretrained(folder / "image_processor")
    return folder


def write_clip(folder: Path) -> None:
    """text_encoder_2/ and tokenizer_2/."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<e>", "<b>", "<u>", *CAPTIONS.split()])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 1), ("<e>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<b>", eos_token="<e>", pad_token="<e>", unk_token="<u>"
    ).save_pretrained(folder / "tokenizer_2")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=77, **sizes, **ends)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder_2")


def write_pipeline(folder: Path, *, i2v: bool) -> Path:
    """All parts. Returns: `folder`."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

    (write_llava if i2v else write_llm)(folder)
    write_clip(folder)
    torch.manual_seed(1)
    transformer = HunyuanVideoTransformer3DModel(
        **TRANSFORMER,
        out_channels=TRANSFORMER["in_channels"],
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        image_condition_type="token_replace" if i2v else None,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKLHunyuanVideo(**VAE).save_pretrained(folder / "vae")
    return folder
