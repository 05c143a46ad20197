"""Frozen language models as text encoders: captions, alone or with an image, within the prompt of HunyuanVideo.

Letters of the shape suffixes: B batch, C channels, H W space, L tokens, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from opensora_like.models.image_encoders import prepared
from opensora_like.models.text_encoders import FrozenEncoder
from opensora_like.models.text_loading import DTYPES, Precision, check_source, load_model, pipeline_parts
from opensora_like.models.tiny_encoders import tiny_sizes
from opensora_like.models.tiny_llm import END_HEADER, IMAGE, special_id, tiny_llama, tiny_llava, tokenize_bytes
from opensora_like.registry import MODELS

MaskedTokenize = Callable[[Sequence[str], int], tuple[Tensor, Tensor]]  # (texts, length) -> ids, bool: no padding
NUM_HEADER = 4  # tokens of the answer's header, which are no part of the embedding
PUBLISHED_IMAGE = 24**2  # tokens of an image of 336 x 336 in patches of 14


class Prompt(NamedTuple):
    """What a caption is put into.

    Args:
        template: with {} for the caption.
        num_before: tokens before the caption, whose embeddings are left out.
    """

    template: str
    num_before: int

    def around(self, text: str) -> str:
        return self.template.format(text)


@MODELS.register_module("llm")
class LLMTextEncoder(FrozenEncoder):
    """Token embeddings of a LLaMA as HunyuanVideo takes them for text-to-video.

    A caption is put into the published prompt, which asks for a description of a video; taken are the hidden states of
    a layer near the end, of the caption and what follows it. Rows behind that are exactly zero, which is how the
    denoiser knows padding.

    Args:
        from_pretrained: folder, or name on the hub, of weights and tokenizer; of a pipeline's folder its
            ``text_encoder`` and ``tokenizer`` are taken.
        tiny: instead: sizes of a model with fixed random weights over bytes; any of hidden_size, num_layers,
            num_heads, seed. ``{}`` takes the defaults. For tests.
        max_length: tokens of a caption; longer ones are cut.
        num_hidden_layers_to_skip: layers at the end whose work is left out.
        dtype, cache_dir, cache_size, cache_device, chunk_size: as `T5TextEncoder`.

    Raises:
        ValueError, FileNotFoundError, OSError: as `T5TextEncoder`; ValueError also for more layers to skip than there
            are.

    Source: HunyuanVideo, arXiv:2412.03603, section 4.3; diffusers:pipelines/hunyuan_video/pipeline_hunyuan_video.py,
    which holds the prompt.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        max_length: int = 256,
        num_hidden_layers_to_skip: int = 2,
        dtype: Precision = "bf16",
        cache_dir: str | None = None,
        cache_size: int = 256,
        cache_device: Literal["cpu", "same"] = "cpu",
        chunk_size: int = 1,
    ) -> None:
        sizes = {"max_length": max_length, "chunk_size": chunk_size}
        check_source("llm", from_pretrained, tiny, **sizes)
        if from_pretrained is not None:
            source, tokenizer = pipeline_parts(from_pretrained)
            model, words = load_model("llm", source, tokenizer, dtype=dtype, cache_dir=cache_dir)
            tokenize: MaskedTokenize = _masked(_padded_right(words))
        else:
            model, tokenize = tiny_llama(tiny_sizes(tiny, "llm")).to(DTYPES[dtype]), tokenize_bytes
        super().__init__(model, tokenize, cache_size=cache_size, cache_device=cache_device, **sizes)
        self._layer = _layer(num_hidden_layers_to_skip, model.config.num_hidden_layers, where="llm encoder")
        self._prompt = _published_prompt(with_image=False, tokenize=tokenize_bytes if tiny is not None else None)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions.

        Returns: [B, max_length, D], exactly zero behind each caption's end; on the encoder's device.
        """
        return self._look_up(texts, self.max_length, self._run)

    def null(self) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one, in the prompt. Returns: [1, L, D]."""
        return self.encode([""])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Tensor:
        skipped = self._prompt.num_before
        prompts = [self._prompt.around(text) for text in texts]
        ids_BL, mask_BL = self._tokenize(prompts, skipped + self.max_length)
        ids_BL, mask_BL = (part.to(self.device, non_blocking=True) for part in (ids_BL, mask_BL))
        out = self.model(
            input_ids=ids_BL, attention_mask=mask_BL.long(), output_hidden_states=True, use_cache=False
        ).hidden_states[self._layer]
        return out[:, skipped:].masked_fill(~mask_BL[:, skipped:, None], 0.0)


@MODELS.register_module("llava")
class LLaVATextEncoder(nn.Module):
    """Token embeddings of captions and of the first frame, from a LLaVA, as HunyuanVideo takes them for image-to-video.

    The image's tokens come first, every fourth of them; then the caption's as `LLMTextEncoder` has them, without the
    header of the answer, which the prompt ends with. Where a caption is so long that the header was cut, it is as many
    tokens at the end that are left out, for each sample by itself.

    Args:
        from_pretrained: folder of a pipeline, whose ``text_encoder``, ``tokenizer`` and ``image_processor`` are taken,
            or one that holds all three.
        tiny, num_hidden_layers_to_skip, dtype, cache_dir: as `LLMTextEncoder`.
        max_length: tokens of a caption and the header; longer captions are cut. As an attribute: of all.
        image_embed_interleave: one of so many of the image's tokens is taken.

    Raises:
        ValueError, FileNotFoundError, OSError: as `LLMTextEncoder`.

    Source: diffusers:pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py, which holds the prompt.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        max_length: int = 256,
        num_hidden_layers_to_skip: int = 2,
        image_embed_interleave: int = 4,
        dtype: Precision = "bf16",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"max_length": max_length, "image_embed_interleave": image_embed_interleave}
        check_source("llava", from_pretrained, tiny, **sizes)
        if max_length <= NUM_HEADER:
            raise ValueError(f"llava encoder: max_length={max_length} must be above the header's {NUM_HEADER} tokens")
        if from_pretrained is not None:
            self.model, self._prepare, tokenizer = _load_llava(from_pretrained, dtype=dtype, cache_dir=cache_dir)
            self._tokenize, self._header_id = _masked(tokenizer), tokenizer.convert_tokens_to_ids(END_HEADER)
        else:
            model, self._prepare = tiny_llava(tiny_sizes(tiny, "llava"))
            self.model, self._tokenize, self._header_id = (
                model.to(DTYPES[dtype]),
                tokenize_bytes,
                special_id(END_HEADER),
            )
        self.model.requires_grad_(False).eval()
        config = self.model.config
        self.output_dim = int(config.text_config.hidden_size)
        self._num_text, self._interleave = max_length, image_embed_interleave
        self._num_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        self.max_length = self.num_tokens(num_image=self._num_image, **sizes)
        self._image_id = int(config.image_token_index)
        self._layer = _layer(num_hidden_layers_to_skip, config.text_config.num_hidden_layers, where="llava encoder")
        self._prompt = _published_prompt(with_image=True, tokenize=tokenize_bytes if tiny is not None else None)

    @staticmethod
    def num_tokens(
        *, max_length: int = 256, image_embed_interleave: int = 4, num_image: int = PUBLISHED_IMAGE, **_: object
    ) -> int:
        """Tokens of an embedding, for who plans with a config and builds no encoder. Args: as the class."""
        return -(-num_image // image_embed_interleave) + max_length - NUM_HEADER

    def train(self, mode: bool = True) -> LLaVATextEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode_captioned_images(self, texts: Sequence[str], images_BCHW: Tensor) -> Tensor:
        """Embeddings of captions, each with its image.

        Args:
            texts: "" for a dropped caption. The text that stands for an image in the prompt is taken out of them.
            images_BCHW: in [-1, 1], of any size; brought to the encoder's by the published preprocessing, on 8 bits.

        Returns: [B, L, D], the image's tokens first, exactly zero behind each caption's end; L is `max_length`.

        Raises:
            ValueError: not one image per caption, or weights whose tokenizer does not know the image's place.
        """
        if isinstance(texts, str) or len(texts) != len(images_BCHW) or not texts:
            raise ValueError(f"llava encoder: {len(images_BCHW)} images for captions {texts!r}; give one for each")
        weight = next(self.model.parameters())
        prompts = [self._prompt.around(text.replace(IMAGE, "")) for text in texts]
        ids_BL, mask_BL = self._tokenize(prompts, self._prompt.num_before + self._num_text)
        ids, mask, place = self._with_image(ids_BL, mask_BL)  # on the CPU: what it finds decides shapes
        ids_BL, mask_BL, ids, mask = (p.to(weight.device, non_blocking=True) for p in (ids_BL, mask_BL, ids, mask))
        states = self.model.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=-1) - 1).masked_fill(~mask, 1),
            pixel_values=prepared(images_BCHW, self._prepare).to(weight, non_blocking=True),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states[self._layer]
        image_BLD = states[:, place : place + self._num_image : self._interleave]
        return torch.cat([image_BLD, self._text_part(states, ids_BL, mask_BL)], dim=1)

    def _with_image(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, int]:
        """Ids and mask with as many tokens for the image as it has, and where they begin."""
        places = (ids_BL == self._image_id).nonzero()
        if len(places) != len(ids_BL) or places[:, 1].unique().numel() != 1:
            raise ValueError(
                f"llava encoder: {len(places)} tokens {self._image_id} for images in {len(ids_BL)} prompts, one in the"
                f" same place of each is needed; the tokenizer has to make one of {IMAGE!r}"
            )
        place, number = int(places[0, 1]), len(ids_BL)
        image = ids_BL.new_full((number, self._num_image), self._image_id)
        ids = torch.cat([ids_BL[:, :place], image, ids_BL[:, place + 1 :]], dim=1)
        mask = torch.cat([mask_BL[:, :place], torch.ones_like(image, dtype=torch.bool), mask_BL[:, place + 1 :]], dim=1)
        return ids, mask, place

    def _text_part(self, states: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, max_length - NUM_HEADER, D] of the caption and of what follows the header."""
        first, length = self._prompt.num_before, ids_BL.shape[1]
        places = torch.arange(length, device=ids_BL.device)
        is_header = (ids_BL == self._header_id) & (places >= first)
        last_B = torch.where(is_header.any(dim=1), (is_header * places).amax(dim=1), length - 1)
        kept = places[first : length - NUM_HEADER].expand(len(ids_BL), -1)
        kept = kept + NUM_HEADER * (kept > last_B[:, None] - NUM_HEADER)
        index = (kept + self._num_image - 1)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index).masked_fill(~mask_BL.gather(1, kept)[..., None], 0.0)


def _published_prompt(*, with_image: bool, tokenize: MaskedTokenize | None) -> Prompt:
    """The prompt that the models were trained with, as diffusers has it.

    Args:
        tokenize: counts the tokens before the caption; None takes the published count.
    """
    name = "pipeline_hunyuan_video_image2video" if with_image else "pipeline_hunyuan_video"
    source = importlib.import_module(f"diffusers.pipelines.hunyuan_video.{name}")
    found: Mapping[str, Any] = source.DEFAULT_PROMPT_TEMPLATE
    template = found["template"]
    if tokenize is None:
        return Prompt(template, int(found["crop_start"]))
    before = template.partition("{}")[0]
    return Prompt(template, int(tokenize([before], len(before) + 1)[1].sum()))


def _layer(num_skipped: int, num_layers: int, *, where: str) -> int:
    """The index of the hidden states: behind each layer, and one before them all."""
    if not 0 <= num_skipped <= num_layers:
        raise ValueError(
            f"{where}: num_hidden_layers_to_skip={num_skipped} must be 0 to {num_layers}, the layers that there are"
        )
    return -(num_skipped + 1)


def _padded_right(tokenizer: Any) -> Any:
    tokenizer.padding_side = "right"  # what is before the caption is counted from the left
    return tokenizer


def _masked(tokenizer: Any) -> MaskedTokenize:
    def tokenize(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        found = tokenizer(list(texts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return found.input_ids, found.attention_mask.bool()

    return tokenize


def _load_llava(source: str, *, dtype: Precision, cache_dir: str | None) -> tuple[nn.Module, Any, Any]:
    """Model, processor of images, tokenizer."""
    from transformers import CLIPImageProcessor

    folder, tokenizer = pipeline_parts(source)
    processor = Path(source) / "image_processor"
    model, words = load_model("llava", folder, tokenizer, dtype=dtype, cache_dir=cache_dir)
    prepare = CLIPImageProcessor.from_pretrained(processor if processor.is_dir() else source, cache_dir=cache_dir)
    return model, prepare, _padded_right(words)
