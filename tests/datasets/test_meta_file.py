""".meta files: what was written comes back, other writers' files are read, and no file can run a program."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_like.datasets.meta_file import MetaClip, MetaFacts, jpeg_of, read_content, read_meta, write_meta

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dfm_a.json").read_text())


def clip(**changes) -> MetaClip:
    draw = torch.Generator().manual_seed(0)
    values = {
        "latents_CTHW": torch.randn(16, 3, 4, 6, generator=draw).half(),
        "embeddings_LD": torch.randn(8, 5, generator=draw).bfloat16(),
        "text": "a red circle",
        "num_frames": 9,
        "first_frame": jpeg_of(np.full((32, 48, 3), 200, np.uint8)),
        "file_name": "a.mp4",
        "fps": 8.0,
    }
    return MetaClip(**{**values, **changes})


FACTS = MetaFacts(
    metadata={"file_name": "a.mp4", "width": 64, "height": 40, "start_frame": 0, "end_frame": 11},
    source_path="videos/a.mp4",
    num_frames_read=12,
    resize={"target_size": (32, 48), "resize_mode": "bilinear", "maintain_aspect_ratio": True, "center_crop": True},
)


def foreign(**changes) -> dict:
    """The content that the published trainer writes; its first frame is an array."""
    values = {
        "text_embeddings": torch.ones(1, 226, 8, dtype=torch.float16),
        "video_latents": torch.arange(16 * 3 * 24, dtype=torch.float16).view(1, 16, 3, 4, 6),
        "first_frame": np.full((32, 48, 3), 90, np.uint8),
        "metadata": {"file_name": "b.mp4", "width": 64, "height": 40, "vila_caption": "a blue square"},
        "num_frames": 12,
        "original_filename": "b.mp4",
        "deterministic_latents": True,
        "resize_settings": {"target_size": (32, 48), "resize_mode": "bilinear"},
        "mean": np.float32(0.5),
    }
    return {**values, **changes}


def same(one: MetaClip, other: MetaClip) -> bool:
    tensors = torch.equal(one.latents_CTHW, other.latents_CTHW) and torch.equal(one.embeddings_LD, other.embeddings_LD)
    rest = ("text", "num_frames", "first_frame", "file_name", "fps")
    return tensors and all(getattr(one, n) == getattr(other, n) for n in rest)


def test_there_and_back(tmp_path):
    """What was written is read bit for bit, dtype and JPEG included, and any unpickler reads it as well."""
    write_meta(tmp_path / "new" / "a.meta", clip(), FACTS)
    found = read_meta(tmp_path / "new" / "a.meta")
    assert same(found, clip()) and found.latents_CTHW.dtype == torch.float16 and found.size == (32, 48)
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a.meta"]
    content = pickle.loads((tmp_path / "new" / "a.meta").read_bytes())
    assert content["first_frame"][:3] == b"\xff\xd8\xff"
    assert Image.open(io.BytesIO(content["first_frame"])).size == (48, 32)
    assert content["metadata"] == {**FACTS.metadata, "vila_caption": "a red circle", "caption": "a red circle"}
    assert (content["num_frames"], content["num_frames_read"]) == (9, 12)


def test_written_keys_are_those_that_readers_look_for(tmp_path):
    """Every key of the published reader is there, with its number of dimensions; a frame's number comes with it."""
    asked = GOLDEN["dfm_reader"]
    assert asked["required"] == ["text_embeddings [1,S,E]", "video_latents [1,C,T,H,W]"]
    frames = MetaFacts(FACTS.metadata, "a.mp4", 1, mode="frames", frame=(2, 5))
    write_meta(tmp_path / "a.meta", clip(latents_CTHW=torch.zeros(16, 1, 4, 6), first_frame=None), frames)
    content = read_content(tmp_path / "a.meta")
    assert content["text_embeddings"].ndim == 3 and content["video_latents"].ndim == 5
    told = {"metadata", "original_filename", "original_video_path", "deterministic_latents", "num_frames"}
    assert told < content.keys() and told < set(asked["optional"]) and "first_frame" not in content
    assert (content["frame_index"], content["total_frames_in_video"], content["processing_mode"]) == (2, 5, "frames")


def test_a_slice_is_written_alone(tmp_path):
    """A view of a large tensor does not take the large tensor along."""
    large = torch.zeros(64, 16, 3, 4, 6)
    write_meta(tmp_path / "a.meta", clip(latents_CTHW=large[0]), FACTS)
    assert (tmp_path / "a.meta").stat().st_size < 2 * large[0].numel() * 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_the_published_trainer(tmp_path, protocol):
    """Tensors, arrays and numbers of every pickle protocol are read; an array for a first frame becomes a JPEG."""
    (tmp_path / "b.meta").write_bytes(pickle.dumps(foreign(), protocol=protocol))
    found = read_meta(tmp_path / "b.meta")
    assert torch.equal(found.latents_CTHW, foreign()["video_latents"][0]) and found.embeddings_LD.shape == (226, 8)
    assert (found.text, found.num_frames, found.file_name) == ("a blue square", 9, "b.mp4")
    pixels = np.asarray(Image.open(io.BytesIO(found.first_frame)))
    assert pixels.shape == (32, 48, 3) and abs(pixels.astype(int) - 90).max() <= 1
    assert read_content(tmp_path / "b.meta")["mean"] == 0.5


def test_files_of_its_successor(tmp_path):
    """torch.save's files with the recorded keys, types and shapes are read; the prompt is the caption."""
    for number, file in enumerate(GOLDEN["meta"]["files"]):
        if "video_latents" not in file["content"]:
            continue
        content = {}
        for key, what in file["content"].items():
            if what["kind"] == "tensor":
                content[key] = torch.ones(what["shape"], dtype=getattr(torch, what["dtype"].removeprefix("torch.")))
            else:
                content[key] = tuple(what["value"]) if what["kind"] == "tuple" else what["value"]
        path = tmp_path / f"{number}.meta"
        torch.save(content, path)
        found = read_meta(path)
        assert list(found.latents_CTHW.shape) == file["content"]["video_latents"]["shape"][1:]
        assert found.text == file["content"]["prompt"]["value"] and found.file_name == "clip_a.mp4"
        assert (found.first_frame is None) == (file["content"]["first_frame"]["kind"] == "NoneType")


def test_parts_that_wan_does_not_take_are_named(tmp_path):
    """Tensors of other models are not silently lost."""
    (tmp_path / "b.meta").write_bytes(pickle.dumps(foreign(text_mask=torch.ones(1, 226), note="x")))
    assert read_meta(tmp_path / "b.meta").other == ("text_mask",)


class _Call:
    """Unpickled without care, calls `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "builtins.eval"), (torch.load, "torch.serialization.load")],
)
@pytest.mark.parametrize("how", ["pickle", "torch", "tensor"])
def test_a_file_cannot_run_a_program(tmp_path, function, name, how):
    """A pickle that calls something is refused by the name of what it asks for; so is one inside a tensor's bytes."""
    mark = tmp_path / "was-run"
    hostile = foreign(metadata=_Call(function, f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"))
    path = tmp_path / "bad.meta"
    if how == "torch":
        torch.save({"metadata": hostile["metadata"]}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        inner = io.BytesIO()
        torch.save(hostile["metadata"], inner, _use_new_zipfile_serialization=False)
        path.write_bytes(pickle.dumps({"a": _Call(torch.storage._load_from_bytes, inner.getvalue())}))
    with pytest.raises(
        ValueError, match=rf"bad\.meta.* asks for {name if how == 'pickle' else name.removeprefix('builtins.')}"
    ):
        read_meta(path)
    assert not mark.exists()


def test_arrays_of_objects_are_refused(tmp_path):
    """An array may hold numbers only."""
    (tmp_path / "bad.meta").write_bytes(pickle.dumps({"a": np.array([{}], dtype=object)}))
    with pytest.raises(ValueError, match="holds an array of object"):
        read_meta(tmp_path / "bad.meta")


def test_what_is_no_meta_file_says_so(tmp_path):
    """Missing, empty, cut off, of another kind, or of another model: an error that names the file."""
    whole = pickle.dumps(foreign())
    torch.save(foreign(), tmp_path / "zip.meta")
    (tmp_path / "cutzip.meta").write_bytes((tmp_path / "zip.meta").read_bytes()[:-40])
    other = foreign(video_latents=torch.ones(1, 4, 2, 2, 2))
    for name, content, message in (
        ("empty", b"", "EOFError"),
        ("cut", whole[: len(whole) // 2], "cannot be read"),
        ("noise", bytes(range(256)), "cannot be read"),
        ("list", pickle.dumps([1]), "holds a list"),
        ("nothing", pickle.dumps({"a": 1}), r"no tensor 'video_latents', only \['a'\]"),
        ("other", pickle.dumps(other), "4 channels, those of Wan 2.1 have 16"),
        (
            "batch",
            pickle.dumps(foreign(text_embeddings=torch.ones(2, 3, 4))),
            r"text_embeddings has the shape \(2, 3, 4",
        ),
        ("frame", pickle.dumps(foreign(first_frame=np.zeros((4, 4)))), r"first_frame is float64 \(4, 4\)"),
    ):
        (tmp_path / f"{name}.meta").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.meta.*{message}"):
            read_meta(tmp_path / f"{name}.meta")
    with pytest.raises(ValueError, match="cutzip"):
        read_meta(tmp_path / "cutzip.meta")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_meta(tmp_path / "absent.meta")
