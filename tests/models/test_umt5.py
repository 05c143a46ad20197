"""umT5 for Wan: zero beyond the caption, padding unseen, cleaned captions, embeddings checked, folders loaded."""

import pytest
import torch

from opensora_like.models.base import TextEncoder
from opensora_like.models.text_encoders import UMT5TextEncoder, clean_caption
from opensora_like.models.text_loading import tie_embeddings
from opensora_like.registry import MODELS, build

TOKENIZER_OUT = ["input_ids", "attention_mask"]
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}


def small(**changes) -> UMT5TextEncoder:
    return build({"type": "umt5", "tiny": SMALL, "max_length": 32, "dtype": "fp32"} | changes, MODELS)


def saved(folder, *, parts: bool = False):
    """A tiny model and tokenizer in a folder, or in the folders of a pipeline. Returns: both."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_input_names=TOKENIZER_OUT
    )
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = UMT5EncoderModel(config).eval()
    model.save_pretrained(folder / "text_encoder" if parts else folder)
    tokenizer.save_pretrained(folder / "tokenizer" if parts else folder)
    return model, tokenizer


def test_zero_beyond_the_caption():
    """Rows up to the end token are not zero, all after it exactly are; the empty caption has its end token."""
    encoder = small()
    assert isinstance(encoder, TextEncoder) and encoder.output_dim == 32
    out = encoder.encode(["abc", "", "x" * 100])
    assert out.shape == (3, 32, 32)
    assert (out != 0).any(dim=-1).sum(dim=1).tolist() == [4, 1, 32]
    assert all((row[:length] != 0).any(dim=-1).all() for row, length in zip(out, (4, 1, 32), strict=True))
    assert torch.equal(encoder.null(), out[1:2])
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().model.training


def test_defaults_are_wans():
    """512 tokens in bfloat16, finite and not zero."""
    encoder = UMT5TextEncoder(tiny=SMALL)
    out = encoder.encode(["a red circle"])
    assert out.shape == (1, 512, 32) and out.dtype == torch.bfloat16 and out.isfinite().all() and out.any()
    assert (out != 0).any(dim=-1).sum() == 13


def test_padding_is_not_attended_to():
    """More padding leaves a caption's rows as they are."""
    short, long = small().encode(["abc"]), small(max_length=50).encode(["abc"])
    torch.testing.assert_close(short[:, :4], long[:, :4], atol=1e-6, rtol=1e-6)
    assert not long[:, 4:].any()


def test_the_same_caption_in_other_clothes():
    """Escapes, spaces and line ends are brought to one form before encoding; `clean=False` leaves them."""
    messy, clean = "  a &amp;amp; b\n\t c &lt;d&gt; ", "a & b c <d>"
    assert clean_caption(messy) == clean and clean_caption(clean) == clean and clean_caption(" \n") == ""
    encoder = small()
    assert torch.equal(encoder.encode([messy]), encoder.encode([clean]))
    raw = small(clean=False)
    assert not torch.equal(raw.encode([messy]), raw.encode([clean]))
    assert torch.equal(raw.encode([clean]), encoder.encode([clean]))


def test_every_process_has_the_same_tiny_weights():
    """Weights depend on the seed alone; the sum is pinned, since a checkpoint trained on them needs them again."""
    torch.manual_seed(123)
    encoder = small()
    assert sum(p.double().sum().item() for p in encoder.model.parameters()) == pytest.approx(203.1163, abs=1e-3)
    assert torch.equal(small().encode(["x"]), encoder.encode(["x"]))
    assert not torch.equal(small(tiny=SMALL | {"seed": 1}).encode(["x"]), encoder.encode(["x"]))


@pytest.mark.parametrize("broken, message", [(float("nan"), "nan"), (0.0, r"0\.0")])
def test_broken_embeddings_are_not_passed_on(broken, message):
    """An embedding that is not finite, or zero throughout, is an error that names the caption."""
    encoder = small()
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.fill_(broken)
    with pytest.raises(FloatingPointError, match=rf"embedding of 'a red circle' has a largest value of {message}"):
        encoder.encode(["a red circle"])


def test_loading_from_folders(tmp_path):
    """A model's folder and a pipeline's give what transformers gives with a mask, zeros behind."""
    model, tokenizer = saved(tmp_path / "one")
    saved(tmp_path / "pipe", parts=True)
    given = tokenizer(["red circle"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        want = model(**given).last_hidden_state * given.attention_mask[..., None]
    for folder in ("one", "pipe"):
        encoder = UMT5TextEncoder(str(tmp_path / folder), max_length=12, dtype="fp32")
        assert want.any(dim=-1).sum() == 3
        torch.testing.assert_close(encoder.encode(["red circle"]), want)
        assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_embeddings_are_tied_or_refused(tmp_path):
    """A table that was loaded under one of its two names serves both; none at all is an error."""
    model, _ = saved(tmp_path)
    table = model.shared.weight.detach().clone()
    for lost in ("shared", "encoder.embed_tokens"):
        module = model.get_submodule(lost)
        module.weight = torch.nn.Parameter(torch.zeros_like(table))
        tie_embeddings(model, where="here")
        assert torch.equal(model.shared.weight, table)
        assert model.encoder.embed_tokens.weight is model.shared.weight
    with torch.no_grad():
        model.shared.weight.zero_()
    with pytest.raises(ValueError, match="here: the table of token embeddings"):
        tie_embeddings(model, where="here")


def test_what_cannot_be_built_says_so(tmp_path):
    """Errors name the argument: half precision that overflows, no source, a folder of another model."""
    from transformers import T5Config, T5EncoderModel

    with pytest.raises(ValueError, match="dtype='fp16'"):
        small(dtype="fp16")
    with pytest.raises(ValueError, match="dtype='fp16' overflows"):
        UMT5TextEncoder(tiny=SMALL, dtype="fp16")
    with pytest.raises(ValueError, match=r"umt5 encoder: .*give exactly one"):
        UMT5TextEncoder()
    with pytest.raises(FileNotFoundError, match=r"umt5 encoder: from_pretrained=.*not a folder"):
        UMT5TextEncoder(str(tmp_path / "absent"))
    T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"holds a 't5' model, one of \['umt5'\]"):
        UMT5TextEncoder(str(tmp_path))
    with pytest.raises(ValueError, match="at least one caption"):
        small().encode("abc")
