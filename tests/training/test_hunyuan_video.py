"""Training HunyuanVideo: runs of several processes that resume exactly, and what its loss and conditions cover."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.checkpoint.weights import read_weights
from opensora_like.config import read_config
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.registry import SCHEDULERS, build
from opensora_like.settings import RunConfig
from opensora_like.training.build import build_encode, build_frozen, build_model, build_run, build_step
from opensora_like.training.cached import check_no_pixels_needed
from opensora_like.training.trainer import Run, train
from tests.make_clips import numbered_frames, write_clip
from tests.tools.cache_harness import run as cache
from tests.training.harness import assert_same, metrics_of, torchrun

CPU = torch.device("cpu")
FSDP2 = ["--booster", "{'type': 'fsdp2'}"]
TENSOR_PARALLEL = ["--booster", "{'type': 'fsdp2', 'tp_size': 2}"]
ZERO2 = ["--booster", "{'type': 'deepspeed', 'stage': 2}"]
COLUMNS = ("step", "loss", "grad_norm", "samples")


def config_of(kind: str) -> Path:
    return Path(__file__).parent / f"toy_hunyuan_{kind}.py"


def settings_of(kind: str, *arguments: str) -> RunConfig:
    return read_config(config_of(kind), arguments).config


def batch_of(num_frames: int = 9, *, rows: int = 3) -> Batch:
    video = torch.rand(rows, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers, text = list(range(rows)), ["a red circle", "", "a\n\nb"][:rows]
    shape = BucketShape("8px", num_frames, 8, 8)
    return Batch(epoch=0, index=0, shape=shape, rows=numbers, text=text, paths=[""] * rows, video_BCTHW=video)


def encode_of(config: RunConfig):
    autoencoder, encoders = build_frozen(config, CPU)
    return build_encode(config, CPU, build_model(config), autoencoder, encoders)


def train_alone(kind: str, folder: Path, *arguments: str) -> Run:
    """In this process."""
    run = build_run(settings_of(kind, "--outputs", str(folder), *arguments), rt.start(), config_name=kind)
    train(run)
    return run


def test_two_processes_train_and_resume(tmp_path: Path) -> None:
    """Text to video under FSDP2: of four steps the last two again from a checkpoint, bit for bit."""
    common = ["--outputs", str(tmp_path), "--steps", "4", "--ckpt-every", "2", *FSDP2]
    whole = torchrun(2, *common, "--exp-name", "whole", config=config_of("t2v"))
    assert whole.returncode == 0, whole.output
    (half,) = (tmp_path / "whole").glob("epoch*-global_step2")
    parts = torchrun(2, *common, "--exp-name", "parts", "--load", str(half), config=config_of("t2v"))
    assert parts.returncode == 0, parts.output
    rows = metrics_of(tmp_path / "whole", *COLUMNS)
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    assert metrics_of(tmp_path / "parts", *COLUMNS) == rows[2:]
    trained, resumed = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert trained.keys() == resumed.keys() and all(trained[name].equal(resumed[name]) for name in trained)
    train_alone("t2v", tmp_path, "--exp-name", "alone", "--steps", "1", "--accumulation-steps", "2")
    (first,) = metrics_of(tmp_path / "alone", *COLUMNS)
    assert first[1:3] == pytest.approx(rows[0][1:3], rel=1e-4) and first[3] == rows[0][3]


def test_image_to_video_resumes(tmp_path: Path) -> None:
    """In one process: of three steps the last two again from a checkpoint, bit for bit."""
    arguments = ["--steps", "3", "--ckpt-every", "1"]
    whole = train_alone("i2v", tmp_path, "--exp-name", "whole", *arguments)
    (first,) = (tmp_path / "whole").glob("epoch*-global_step1")
    assert_same(whole, train_alone("i2v", tmp_path, "--exp-name", "parts", "--load", str(first), *arguments))


@pytest.mark.parametrize("booster", [ZERO2, TENSOR_PARALLEL], ids=["zero2", "tensor_parallel"])
def test_other_backends_make_the_same_first_step(booster: list[str], tmp_path: Path) -> None:
    """Image to video with ZeRO-2, and with heads cut over two ranks: loss and gradient norm of one process."""
    common = ["--outputs", str(tmp_path), "--steps", "1"]
    found = torchrun(2, *common, "--exp-name", "two", *booster, config=config_of("i2v"))
    assert found.returncode == 0, found.output
    sizes = [] if booster is TENSOR_PARALLEL else ["--accumulation-steps", "2"]
    train_alone("i2v", tmp_path, "--steps", "1", "--exp-name", "one", *sizes)
    (two,), (one,) = (metrics_of(tmp_path / name, *COLUMNS) for name in ("two", "one"))
    assert two[1:3] == pytest.approx(one[1:3], rel=1e-3) and two[3] == one[3]


class Wrong(torch.nn.Module):
    """Predicts 0, and `error` in the first latent frame."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x_BCTHW, t_B, conditions):
        out = torch.zeros_like(x_BCTHW)
        out[:, :, :1] = self.error
        return out


def loss_of(kind: str, error: float, num_frames: int = 9) -> float:
    config = settings_of(kind)
    scheduler = build(config.scheduler, SCHEDULERS, where="scheduler", patch_size=2)
    step = build_step(config, Wrong(error), encode_of(config), scheduler, around_forward=nullcontext)
    return step(batch_of(num_frames)).item()


def test_cached_latents_and_captions_train_the_same(tmp_path: Path) -> None:
    """Text to video from a store of latents and of LLaMA's rows: the losses of a run that reads the videos."""
    rows = ["path,text,num_frames,height,width,fps"]
    for number in range(6):
        write_clip(tmp_path / f"{number}.mp4", numbered_frames(9, 32, 32), fps=8)
        rows.append(f"{number}.mp4,clip {number},9,32,32,8")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    dataset = {"type": "video_text", "data_path": str(tmp_path / "table.csv")}
    common = ["--bucket_config", "{'16px_ar1:1': {9: (1.0, 2)}}", "--sample_posterior", "False"]
    assert cache(config_of("t2v"), "--out", tmp_path / "store", "--dataset", dataset, *common) == 0
    cached = {**dataset, "type": "latents", "cache_path": str(tmp_path / "store")}
    for name, section in (("videos", dataset), ("store", cached)):
        train_alone("t2v", tmp_path, "--exp-name", name, "--steps", "3", "--dataset", str(section), *common)
    from_store, from_videos = (metrics_of(tmp_path / name, *COLUMNS) for name in ("store", "videos"))
    assert [row[1] for row in from_store] == pytest.approx([row[1] for row in from_videos], rel=1e-3)


def test_adapters_find_their_linears(tmp_path: Path) -> None:
    """LoRA of queries, keys, values and both layers of the MLPs: these of every block, and nothing else is trained."""
    targets = ["to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2", "proj_mlp"]
    lora = ["--lora-config", str({"r": 2, "lora_alpha": 2, "target_modules": targets})]
    run = train_alone("i2v", tmp_path, "--steps", "1", *lora)
    names = {name.partition(".lora_")[0] for name, _ in run.booster.master_shards()}
    blocks = {name for name in names if "transformer_blocks" in name}
    assert len(blocks) == 5 + 4  # of one block with two streams, and of one with one
    assert names - blocks == {name for name in names if "token_refiner" in name} and len(names - blocks) == 5


def test_the_first_frame_is_in_the_loss_unless_it_is_given() -> None:
    """An error there costs in text-to-video, of images all the more, and nothing in image-to-video."""
    assert loss_of("t2v", 100.0) > 1000 > loss_of("t2v", 0.0)
    assert loss_of("t2v", 100.0, num_frames=1) > 9000
    assert loss_of("i2v", 100.0) == loss_of("i2v", 0.0) < 10


def test_captions_are_encoded_with_the_frame_that_is_given() -> None:
    """The condition is what LLaVA makes of caption and first frame; with t2v among the tasks, of caption and grey."""
    config, batch = settings_of("i2v", "--dropout_ratio", "{}"), batch_of()
    encode = encode_of(config)
    inputs = encode(batch)
    run = encode.encoders["text"].encode_captioned_images
    first = batch.video_BCTHW[:, :, 0]
    torch.testing.assert_close(inputs.conditions["text"], run(batch.text, first))
    assert inputs.given_BT.tolist() == [[True] + [False] * 8] * 3
    none_given = encode_of(settings_of("i2v", "--dropout_ratio", "{}", "--condition_config", "{'t2v': 1.0}"))
    torch.testing.assert_close(none_given(batch).conditions["text"], run(batch.text, torch.zeros_like(first)))


def test_a_dropped_caption_is_empty_and_the_frame_stays() -> None:
    """With probability 1 all captions are the empty one, each with its own frame; between, by sample and epoch."""
    always = encode_of(settings_of("i2v", "--dropout_ratio", "{'text': 1.0}"))
    batch = batch_of()
    run = always.encoders["text"].encode_captioned_images
    first = batch.video_BCTHW[:, :, 0]
    torch.testing.assert_close(always(batch).conditions["text"], run([""] * 3, first))
    sometimes = encode_of(settings_of("i2v", "--dropout_ratio", "{'text': 0.5}"))
    whole = batch_of(rows=3)
    seen = set()
    for epoch in range(6):
        whole.epoch = epoch
        text = sometimes(whole).conditions["text"]
        assert torch.equal(sometimes(whole).conditions["text"], text)
        seen |= {bool(torch.allclose(row, want)) for row, want in zip(text, run(whole.text, first), strict=True)}
    assert seen == {True, False}


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Tasks that the model does not take, LLaVA for text-to-video, cached latents for LLaVA."""
    for kind, arguments, message in (
        ("i2v", ["--condition_config", "{'i2v_tail': 1.0}"], r"HunyuanVideo takes \['i2v_head', 't2v'\] only"),
        ("t2v", ["--condition_config", "{'i2v_head': 1.0}"], r"HunyuanVideo takes \['t2v'\] only"),
        ("t2v", ["--encoders.text.type", "llava"], "is shown given frames, and the model takes none"),
    ):
        config = settings_of(kind, "--outputs", str(tmp_path), *arguments)
        with pytest.raises(ValueError, match=message):
            build_run(config, rt.start(), config_name="toy")
    with pytest.raises(ValueError, match="are not cached; train with a dataset that reads videos"):
        check_no_pixels_needed(settings_of("i2v"))
    encode = encode_of(settings_of("i2v"))
    batch = batch_of()
    batch.latents_BCTHW, batch.video_BCTHW = torch.zeros(3, 12, 9, 4, 4), None
    with pytest.raises(ValueError, match="latents only"):
        encode(batch)
