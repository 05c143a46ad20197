"""Language models as text encoders: the published prompt and its cropping, images, padding, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_like.models.base import TextEncoder
from opensora_like.models.fingerprint import encoder_fingerprint
from opensora_like.models.llm_text_encoder import LLaVATextEncoder, LLMTextEncoder
from opensora_like.registry import MODELS, build
from tests.hunyuan_stand_in import CAPTIONS, llama_tokenizer, templates, write_llava, write_llm

SMALL = {"hidden_size": 16, "num_layers": 3, "num_heads": 2}
TEXTS = ["a red circle", "", "a\n\nblue square", f"{CAPTIONS} " * 40]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


def small_llava(**changes) -> LLaVATextEncoder:
    return build({"type": "llava", "tiny": SMALL, "max_length": 32, "dtype": "fp32"} | changes, MODELS)


def pictures(number: int, height: int = 336, width: int = 400) -> Tensor:
    """In [-1, 1], of whole 8-bit values."""
    values = torch.randint(0, 256, (number, 3, height, width), generator=torch.Generator().manual_seed(0))
    return values / 127.5 - 1


def zeroed(embeddings: Tensor, mask: Tensor) -> Tensor:
    return embeddings * mask.bool()[..., None]


def test_the_stand_in_has_the_published_lengths() -> None:
    """Its tokens before a caption are as many as the published prompts say, so that cropping is put to the test."""
    tokenizer = llama_tokenizer()
    for template in templates().values():
        before = template["template"].partition("{}")[0]
        assert len(tokenizer(before).input_ids) == template["crop_start"]


def test_captions_are_those_of_the_pipeline(llm: Path) -> None:
    """256 rows per caption, of one layer before the last two, cropped alike; zero where the pipeline's mask is."""
    from diffusers import HunyuanVideoPipeline
    from transformers import AutoTokenizer, LlamaModel

    encoder = LLMTextEncoder(str(llm), dtype="fp32")
    out = encoder.encode(TEXTS)
    assert isinstance(encoder, TextEncoder) and out.shape == (4, 256, 16)
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel.from_pretrained(llm / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(llm / "tokenizer"),
        **dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2")),
    )
    want, mask = pipe._get_llama_prompt_embeds(TEXTS, templates()["t2v"], device="cpu")
    torch.testing.assert_close(out, zeroed(want, mask), atol=1e-5, rtol=0)
    assert (out != 0).any(dim=-1).sum(dim=1).tolist() == mask.sum(dim=1).tolist() == [4, 1, 5, 256]
    assert torch.equal(encoder.null(), out[1:2])


def test_captions_with_images_are_those_of_the_pipeline(llava: Path) -> None:
    """144 of the 576 tokens of the image, then 252 rows: of an empty caption, one with a blank line, one cut off."""
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration

    encoder, images = LLaVATextEncoder(str(llava), dtype="fp32"), pictures(4)
    out = encoder.encode_captioned_images(TEXTS, images)
    assert out.shape == (4, 144 + 252, 16) and encoder.max_length == 396
    pipe = HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration.from_pretrained(llava / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(llava / "tokenizer"),
        image_processor=CLIPImageProcessor.from_pretrained(llava / "image_processor"),
        **dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2")),
    )
    for text, image, row in zip(TEXTS, images, out, strict=True):  # the pipeline cuts long captions one at a time only
        shown = ((image + 1) * 127.5).round().to(torch.uint8)
        with torch.no_grad():
            want, mask = pipe._get_llama_prompt_embeds(
                [shown], [text], templates()["i2v"], device="cpu", image_embed_interleave=4
            )
        torch.testing.assert_close(row, zeroed(want, mask)[0], atol=1e-5, rtol=0)
    assert (out != 0).any(dim=-1).sum(dim=1).tolist() == [144 + 4, 144 + 1, 144 + 5, 144 + 252]


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_caption_does_not_depend_on_those_beside_it(chunk_size: int) -> None:
    """Alone or in a batch, cached or not; the caption itself counts."""
    encoder = LLMTextEncoder(tiny=SMALL, max_length=32, dtype="fp32", chunk_size=chunk_size)
    texts = ["a red circle", "", "x" * 100]
    out = encoder.encode(texts)
    assert (out != 0).any(dim=-1).sum(dim=1).tolist() == [13, 1, 32]  # bytes and the end of the turn
    alone = [LLMTextEncoder(tiny=SMALL, max_length=32, dtype="fp32").encode([text]) for text in texts]
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-6, rtol=0)
    assert torch.equal(encoder.encode(texts[::-1]), out.flip(0))
    assert not torch.allclose(encoder.encode(["a red circlE"])[:, :12], out[:1, :12])
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().model.training


def test_an_image_counts_for_its_own_caption_only() -> None:
    """Each sample of a batch is as it is alone; another image changes it, also behind the image's own tokens."""
    encoder = small_llava()
    texts, images = ["a red circle", "", "x" * 100, "a\n\n\n\nb"], pictures(4, 20, 16)
    out = encoder.encode_captioned_images(texts, images)
    assert out.shape == (4, 16 // 4 + 32 - 4, 16) and out.shape[1] == encoder.max_length
    alone = [encoder.encode_captioned_images([t], images[i : i + 1]) for i, t in enumerate(texts)]
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-6, rtol=0)
    other = encoder.encode_captioned_images(texts, torch.cat([-images[:1], images[1:]]))
    assert torch.equal(other[1:], out[1:])
    assert not torch.allclose(other[0, :4], out[0, :4]) and not torch.allclose(other[0, 4:8], out[0, 4:8])
    marked = encoder.encode_captioned_images(["a <image>red circle"], images[:1])
    torch.testing.assert_close(marked, out[:1], atol=1e-6, rtol=0)


def test_layers_that_are_skipped_do_not_count() -> None:
    """The last two change nothing; with one skipped fewer the second last does."""
    encoder = LLMTextEncoder(tiny=SMALL, max_length=8, dtype="fp32", cache_size=0)
    before = encoder.encode(["abc"])
    with torch.no_grad():
        for layer in encoder.model.layers[1:]:
            layer.mlp.down_proj.weight.mul_(2)
    assert torch.equal(encoder.encode(["abc"]), before)
    with torch.no_grad():
        encoder.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert not torch.allclose(encoder.encode(["abc"]), before)


def test_what_a_store_depends_on(llm: Path, tmp_path: Path) -> None:
    """The fingerprint of a pipeline's folder is that of its language model and tokenizer."""
    section = {"type": "llm", "from_pretrained": str(llm)}
    before = encoder_fingerprint(section, where="encoders.text")
    (llm / "elsewhere.json").write_text("{}")
    assert encoder_fingerprint(section, where="encoders.text") == before
    assert encoder_fingerprint({**section, "max_length": 128}, where="encoders.text") != before


def test_mistakes_are_named(llm: Path, llava: Path) -> None:
    """No source, another model's folder, sizes that do not fit, captions without images."""
    for kind in (LLMTextEncoder, LLaVATextEncoder):
        with pytest.raises(ValueError, match="give exactly one"):
            kind()
        with pytest.raises(ValueError, match=r"did you mean .*hidden_size"):
            kind(tiny={"hidden": 3})
        with pytest.raises(ValueError, match="num_hidden_layers_to_skip=4 must be 0 to 3"):
            kind(tiny=SMALL, num_hidden_layers_to_skip=4)
    with pytest.raises(ValueError, match=r"holds a 'llava' model, one of \['llama'\]"):
        LLMTextEncoder(str(llava))
    with pytest.raises(ValueError, match=r"holds a 'llama' model, one of \['llava'\]"):
        LLaVATextEncoder(str(llm))
    with pytest.raises(ValueError, match="above the header's 4"):
        LLaVATextEncoder(tiny=SMALL, max_length=4)
    with pytest.raises(ValueError, match="give one for each"):
        small_llava().encode_captioned_images(["a"], pictures(2, 16, 16))
    with pytest.raises(ValueError, match="at least one caption"):
        LLMTextEncoder(tiny=SMALL, max_length=8).encode([])
