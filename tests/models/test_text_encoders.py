"""Text encoders: reproducible, frozen, cached within bounds, loaded from a folder, distinct for distinct captions."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opensora_like.models.base import TextEncoder
from opensora_like.models.text_encoders import CLIPTextEncoder, T5TextEncoder
from opensora_like.registry import MODELS, build

KINDS = {"t5": T5TextEncoder, "clip": CLIPTextEncoder}
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}


def small(kind: str, **changes):
    arguments = {"type": kind, "tiny": SMALL, "max_length": 32, "dtype": "fp32"} | changes
    return build(arguments, MODELS)


def distance(a, b):
    return 1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_protocol_and_frozen(kind):
    """Built by name: [B, L, D] from T5, [B, D] from CLIP; no gradient, and training mode does not switch it on."""
    encoder = small(kind)
    assert isinstance(encoder, KINDS[kind]) and isinstance(encoder, TextEncoder) and encoder.output_dim == 32
    out = encoder.encode(["a", "b", "a"])
    assert out.shape == ((3, 32, 32) if kind == "t5" else (3, 32)) and out.dtype == torch.float32
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    assert not out.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().model.training
    assert torch.equal(encoder.null(), encoder.encode([""])) and len(encoder.null()) == 1
    assert small(kind, dtype="bf16").encode(["a"]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_distinct_captions_have_distinct_embeddings(kind):
    """All 72 captions of a small world lie apart, and the two of opposite meaning clearly so."""
    encoder = small(kind, tiny={}, max_length=48)
    red, blue = encoder.encode(["a red circle moving left", "a blue square moving up"])
    assert distance(red, blue) > 0.1
    colours, shapes = ("red", "green", "blue", "yellow", "white", "purple"), ("circle", "square", "triangle")
    words = itertools.product(colours, shapes, ("left", "right", "up", "down"))
    out = encoder.encode([f"a {colour} {shape} moving {way}" for colour, shape, way in words]).flatten(1)
    apart = torch.cdist(out, out).fill_diagonal_(torch.inf) / out.norm(dim=1).mean()
    assert apart.min() > 0.1


@pytest.mark.parametrize("kind, recorded", [("t5", 203.1163), ("clip", -28.7834)])
def test_every_process_has_the_same_tiny_weights(kind, recorded):
    """Weights depend on the seed alone; their sum is pinned, since a checkpoint trained on them needs them again."""
    torch.manual_seed(123)
    encoder = small(kind)
    assert sum(p.double().sum().item() for p in encoder.model.parameters()) == pytest.approx(recorded, abs=1e-3)
    assert torch.equal(small(kind).encode(["x"]), encoder.encode(["x"]))
    assert not torch.equal(small(kind, tiny=SMALL | {"seed": 1}).encode(["x"]), encoder.encode(["x"]))


def test_building_leaves_the_global_generator_alone():
    """A tiny encoder draws nothing from torch's generator, so it does not move what is drawn after it."""
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    small("t5")
    small("clip")
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_is_bounded_and_changes_nothing(kind):
    """Each caption runs once while it is kept; the least recently used goes; neighbours do not change an embedding."""
    encoder, plain = small(kind, cache_size=2), small(kind, cache_size=0)
    runs = []
    encoder.model.register_forward_hook(lambda *_: runs.append(1))
    first = encoder.encode(["a", "b", "a"])
    assert len(runs) == 2
    assert torch.equal(encoder.encode(["b", "a"]), first[[1, 0]]) and len(runs) == 2
    assert torch.equal(encoder.encode(["c", "a"])[1], first[0]) and len(runs) == 3  # b was used before a
    encoder.encode(["a"])
    assert len(runs) == 3
    encoder.encode(["b"])
    assert len(runs) == 4 and len(encoder._cache) == 2
    encoder.encode(list("defg"))
    assert len(encoder._cache) == 2
    assert torch.equal(plain.encode(["q", "b", "a"])[1:], first[[1, 0]]) and len(plain._cache) == 0
    torch.testing.assert_close(small(kind, chunk_size=3).encode(["a", "b", "c", "d"])[:2], first[:2])


def test_changing_what_was_returned_does_not_spoil_the_cache():
    """Callers own what they get."""
    encoder = small("t5", cache_device="same")
    want = encoder.encode(["a"]).clone()
    encoder.encode(["a"]).zero_()
    assert torch.equal(encoder.encode(["a"]), want)


def test_padding_can_be_lengthened_or_hidden():
    """`pad_to` adds padding only, to a length that divides; hidden padding does not reach the caption's tokens."""
    encoder, masked = small("t5"), small("t5", attend_padding=False)
    for tokens, ranks in ((18, 4), (7, 8), (32, 2)):
        length = encoder.padded_length(tokens, multiple=ranks)
        assert 32 <= length < 32 + ranks and (tokens + length) % ranks == 0
    assert encoder.encode(["abc"], pad_to=35).shape == (1, 35, 32)
    longer, short = masked.encode(["abc"], pad_to=35), masked.encode(["abc"])
    torch.testing.assert_close(longer[:, :4], short[:, :4])
    assert not torch.allclose(encoder.encode(["abc"], pad_to=35)[:, :4], encoder.encode(["abc"])[:, :4])
    cut = "x" * 40
    torch.testing.assert_close(masked.encode([cut], pad_to=60)[:, :32], masked.encode([cut]))
    with pytest.raises(ValueError, match="pad_to=31 is below max_length=32"):
        encoder.encode(["abc"], pad_to=31)


def test_loading_from_a_folder(tmp_path):
    """Weights and tokenizer saved in a folder give what the model itself gives; a folder of another kind is refused."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model, tokenizer = T5EncoderModel(config).eval(), ByT5Tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = T5TextEncoder(str(tmp_path), max_length=12, dtype="fp32")
    ids = tokenizer(["hello"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(["hello"]), want)
    assert encoder.output_dim == 16
    with pytest.raises(ValueError, match=r"holds a 't5' model, one of \['clip', 'clip_text_model'\]"):
        CLIPTextEncoder(str(tmp_path))


def test_clip_pools_at_the_end_of_the_caption(tmp_path):
    """From a folder, the pooled state is the one at the first end token, also where it pads; positions are checked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = {"<e>": 0, "<b>": 1, "red": 2, "left": 3, "<u>": 4}
    plain = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 1), ("<e>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<b>", eos_token="<e>", pad_token="<e>", unk_token="<u>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=5, max_position_embeddings=8, **sizes, **ends)).eval()
    model.save_pretrained(tmp_path)
    encoder = CLIPTextEncoder(str(tmp_path), max_length=8, dtype="fp32")
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]])).last_hidden_state
    torch.testing.assert_close(encoder.encode(["red left"]), states[:, 3])
    with pytest.raises(ValueError, match="max_length=77, but the model has 8 positions"):
        CLIPTextEncoder(str(tmp_path))


def test_a_folder_that_was_downloaded_in_part(tmp_path: Path) -> None:
    """Without the tokenizer's files, of which transformers makes one that knows no word, or without weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    for _ in range(2):  # also where the weights are gone: it is asked for first, as they take minutes to read
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer: a T5Tokenizer needs one of \['spiece.model', "):
            T5TextEncoder(str(tmp_path), dtype="fp32")
        weights.unlink(missing_ok=True)
    plain = Tokenizer(models.WordLevel({"<u>": 0, "red": 1}, unk_token="<u>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<u>").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"t5 encoder: from_pretrained=.* has no weights: .*model\.safetensors"):
        T5TextEncoder(str(tmp_path), dtype="fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_built_says_so(kind, tmp_path):
    """Errors name the argument: no source, two sources, a missing folder, a misspelt size, sizes that do not divide."""
    with pytest.raises(ValueError, match="give exactly one"):
        KINDS[kind]()
    with pytest.raises(ValueError, match="give exactly one"):
        small(kind, from_pretrained="x")
    with pytest.raises(FileNotFoundError, match=f"{kind} encoder: from_pretrained=.*not a folder"):
        KINDS[kind](str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=f"{kind} encoder: from_pretrained=.*neither a folder with a model"):
        KINDS[kind](str(tmp_path))
    with pytest.raises(ValueError, match="hidden_size"):
        small(kind, tiny={"hidden_sizes": 32})
    with pytest.raises(ValueError, match="hidden_size=32 does not divide by num_heads=5"):
        small(kind, tiny=SMALL | {"num_heads": 5})
    with pytest.raises(ValueError, match="cache_size=-1"):
        small(kind, cache_size=-1)
    with pytest.raises(ValueError, match="at least one caption"):
        small(kind).encode("abc")
