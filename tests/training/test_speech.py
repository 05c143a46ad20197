"""Training and sampling with sound: from mp4 and wav files to weights, on processes, resumed, and back to files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opensora_like import runtime as rt
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.config import read_config, to_dict
from opensora_like.datasets.audio_io import SAMPLE_RATE, read_sound, sound_seconds
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.datasets.video_io import probe, read_frames
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.jobs import plan
from opensora_like.evaluation.observe import read_sampling
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.sampling import save_samples
from opensora_like.evaluation.speaking import draw_sound, write_wav
from opensora_like.evaluation.speech import frames_of_sound
from opensora_like.models.fantasy_talking import convert
from opensora_like.models.wan import Wan
from opensora_like.registry import MODELS, build
from opensora_like.rng import numpy_generator
from opensora_like.settings import InferenceConfig, RunConfig
from opensora_like.training.build import build_encode, build_frozen, build_model
from opensora_like.training.cached import check_no_pixels_needed
from tests.training.harness import metrics_of, torchrun
from tools.make_speech import SpeechSet, write_set

CONFIG = Path(__file__).parent / "speech_config.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of 9 frames with their sound, and a table of them."""
    folder = tmp_path_factory.mktemp("world")
    write_set(SpeechSet(num_clips=8, size=32, num_frames=9), folder)
    with (folder / "clips.csv").open(newline="") as file:
        rows = [{**row, "num_frames": 9, "height": 32, "width": 32, "fps": 8} for row in csv.DictReader(file)]
    with (folder / "meta.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a Wan for the added parts to be trained upon."""
    section = {k: v for k, v in config_of().model.items() if not k.startswith("audio")}
    torch.manual_seed(1)
    model: Wan = build({**section, "type": "wan"}, MODELS, where="model")
    file = tmp_path_factory.mktemp("base") / "wan.safetensors"
    save_file(model.state_dict(), file)
    return file


def config_of(*arguments: str) -> RunConfig:
    return read_config(CONFIG, arguments).config


def training(world: Path, outputs: Path, *more: str) -> list[str]:
    data = ["--dataset.data_path", str(world / "meta.csv"), "--outputs", str(outputs)]
    return [*data, "--steps", "6", "--ckpt_every", "3", *more]


def added_only(base: Path) -> list[str]:
    """Settings under which only what FantasyTalking adds is trained, on top of Wan's weights."""
    pretrained = ["--model.from_pretrained", str(base), "--model.strict_load", "False"]
    return [*pretrained, "--trainable_modules", "['processor.', 'proj_model.']"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = PieceReader(folder)
    return {name: reader.read_whole("master", name) for name in reader.names("master")}


@pytest.fixture(scope="module")
def trained(world: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two processes, of the added weights alone."""
    outputs = tmp_path_factory.mktemp("trained")
    done = torchrun(2, *training(world, outputs, *added_only(base)), config=CONFIG)
    assert done.returncode == 0, done.output
    return outputs / "speech"


def test_two_processes_train_what_is_added(trained: Path) -> None:
    """A checkpoint has the added weights and no other; all of them have moved."""
    weights = weights_of(layout.complete_checkpoints(trained)[-1])
    assert set(weights) == {name for name in build_model(config_of()).state_dict() if convert.is_added(name)}
    assert all(weights[name].any() for name in weights if name.endswith("_proj.weight"))


def test_resumed_training_is_the_same(world: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    """From step 3 on one process with twice the accumulation: the same samples, sounds and what is dropped of them."""
    half = layout.complete_checkpoints(trained)[0]
    more = ["--accumulation_steps", "2", "--load", str(half)]
    done = torchrun(1, *training(world, tmp_path, *added_only(base), *more), config=CONFIG)
    assert done.returncode == 0, done.output
    mine, theirs = (weights_of(layout.complete_checkpoints(root)[-1]) for root in (tmp_path / "speech", trained))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=2e-4, rtol=1e-3)
    names = ("step", "loss")
    for a, b in zip(metrics_of(tmp_path / "speech", *names), metrics_of(trained, *names)[3:], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def batch_of(sounds: list[torch.Tensor] | None) -> Batch:
    video = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = BucketShape("16x16", 5, 16, 16)
    return Batch(0, 0, shape, [0, 1, 2], ["a", "b", "c"], ["", "", ""], video_BCTHW=video, audio=sounds)


def sounds_of(*seconds: float) -> list[torch.Tensor]:
    draws = [draw_sound(numpy_generator(0, "test", i), num_frames=1, fps=1)[0] for i in range(len(seconds))]
    return [torch.from_numpy(d[: round(s * SAMPLE_RATE)]).float() for d, s in zip(draws, seconds, strict=True)]


def encode_of(config: RunConfig):
    return build_encode(config, CPU, build_model(config), *build_frozen(config, CPU))


def test_a_batch_is_heard() -> None:
    """Each clip's sound is encoded as if alone, zero beyond its end; conditions are what the model takes."""
    encode = encode_of(config_of("--dropout_ratio", "{'audio': 0.0}"))
    inputs = encode(batch_of(sounds_of(0.6, 0.3, 0.6)))
    heard = inputs.conditions["audio"]
    assert heard.shape == (3, 29, 16) and heard[0].any(dim=1).all() and not heard[1, 14:].any()
    alone = encode(batch_of(sounds_of(0.6, 0.3, 0.6)[1:2] * 3)).conditions["audio"]
    assert torch.equal(alone[0], heard[1, :14])
    model = build_model(config_of())
    assert model(inputs.x0_BCTHW, torch.rand(3), inputs.conditions).shape == inputs.x0_BCTHW.shape
    with pytest.raises(ValueError, match=r"dataset\.type='video_speech'"):
        encode(batch_of(None))


def test_sound_is_dropped_by_sample() -> None:
    """A clip without its sound has vectors of zeros, by a counter of its row; the others keep theirs bit for bit."""
    sounds = sounds_of(0.6, 0.6, 0.6)
    kept = encode_of(config_of("--dropout_ratio", "{'audio': 0.0}"))(batch_of(sounds)).conditions["audio"]
    half = encode_of(config_of("--dropout_ratio", "{'audio': 0.5}"))
    found, again = (half(batch_of(sounds)).conditions["audio"] for _ in range(2))
    is_dropped = [not row.any() for row in found]
    assert True in is_dropped and False in is_dropped and torch.equal(found, again)
    assert all(torch.equal(row, whole) for row, whole, gone in zip(found, kept, is_dropped, strict=True) if not gone)
    everything = encode_of(config_of("--dropout_ratio", "{'audio': 1.0}"))(batch_of(sounds))
    assert not everything.conditions["audio"].any()


def test_encoders_and_model_have_to_fit() -> None:
    """Sound for a model that is deaf, none for one that hears, and another name."""
    config = config_of()
    deaf = {name: section for name, section in config.encoders.items() if name != "audio"}
    with pytest.raises(ValueError, match=r"the model needs \['audio'\]"):
        encode_of(replace(config, encoders=deaf))
    with pytest.raises(ValueError, match=r"encoders\.audio does not encode sound"):
        encode_of(replace(config, encoders={**deaf, "audio": deaf["text"]}))
    blind = {name: section for name, section in config.encoders.items() if name != "image_embeds"}
    with pytest.raises(ValueError, match=r"encoders\.audio encodes sound, which is not cached"):
        check_no_pixels_needed(replace(config, encoders=blind))


def sampling(folder: Path, *arguments: str) -> InferenceConfig:
    """An inference config of the same models."""
    found = to_dict(config_of())
    text = "".join(f"{name} = {found[name]!r}\n" for name in ("model", "autoencoder", "encoders"))
    settings = {"height": 16, "width": 16, "num_frames": 9, "num_steps": 2, "fps_save": 8, "dtype": "fp32"}
    settings |= {"cond_type": "i2v_head", "guidance": 2.0, "guidance_img": 1.0, "audio_guidance": 3.0}
    settings |= {"fps_in_caption": False, "save_dir": str(folder / "samples")}
    path = folder / "inference.py"
    path.write_text(text + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    return read_config(path, arguments, schema=InferenceConfig).config


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frame, and sounds of several lengths."""
    folder = tmp_path_factory.mktemp("sounds")
    write_image(folder / "frame.png", np.full((16, 16, 3), 90, np.uint8))
    for name, num_frames in (("short", 2), ("long", 24)):
        write_wav(folder / f"{name}.wav", draw_sound(numpy_generator(0, name), num_frames=num_frames, fps=8)[0])
    return folder


def test_a_sample_is_as_long_as_its_sound(trained: Path, sounds: Path, tmp_path: Path) -> None:
    """From the checkpoint of the added weights: mp4 files with their sound, of its length up to num_frames."""
    table = sounds / "prompts.csv"
    rows = ["text,name,ref,audio", "a red circle,short,frame.png,short.wav", "a blue square,long,frame.png,long.wav"]
    table.write_text("\n".join(rows) + "\n")
    cfg = sampling(tmp_path, "--ckpt-path", str(trained), "--prompts", str(table), "--batch-size", "2")
    jobs = plan(cfg, rt.start())
    files = save_samples(VideoGenerator(cfg, CPU), jobs)
    assert [probe(file).num_frames for file in files] == [5, 9]
    assert [frames_of_sound(n / 8, 8, most=9) for n in (2, 24)] == [5, 9]
    for file, num_frames, name in zip(files, (5, 9), ("short", "long"), strict=True):
        seconds = num_frames / 8
        assert sound_seconds(file) == pytest.approx(seconds, abs=0.03)
        num_samples = round(min(seconds, sound_seconds(sounds / f"{name}.wav")) * SAMPLE_RATE)
        played, given = (read_sound(path, 0.0, num_samples) for path in (file, sounds / f"{name}.wav"))
        assert np.corrcoef(played, given)[0, 1] > 0.98
        assert read_frames(file, [num_frames - 1]).shape == (1, 16, 16, 3)
    assert plan(cfg, rt.start()) == []  # all are made


def test_sound_decides_what_is_sampled(trained: Path, sounds: Path, tmp_path: Path) -> None:
    """Another sound gives another video, the same one the same; with a scale of 0 it makes no difference."""

    def video(sound: str, *arguments: str) -> torch.Tensor:
        given = ["--prompt", "a red circle", "--ref", str(sounds / "frame.png"), "--audio", str(sounds / sound)]
        cfg = sampling(tmp_path, "--ckpt-path", str(trained), *given, "--num-frames", "5", *arguments)
        return next(VideoGenerator(cfg, CPU).sample(read_prompts(cfg))).video_CTHW

    quiet = ["--model.audio_scale", "0.0"]
    assert torch.equal(video("short.wav"), video("short.wav"))
    assert not torch.equal(video("short.wav"), video("long.wav"))
    assert not torch.equal(video("short.wav"), video("short.wav", "--audio_guidance", "1.0"))
    assert torch.equal(video("short.wav", *quiet), video("long.wav", *quiet))


def test_published_files_sample_as_the_checkpoint(trained: Path, base: Path, sounds: Path, tmp_path: Path) -> None:
    """Wan's file and the table of what is added, as they are published, give the video of the run's checkpoint."""
    added = convert.to_original(weights_of(layout.complete_checkpoints(trained)[-1]))
    table = {
        "proj_model": {n.removeprefix("proj_model."): w for n, w in added.items() if n.startswith("proj_model.")},
        "audio_processor": {n: w for n, w in added.items() if ".processor." in n},
    }
    torch.save(table, tmp_path / "added.ckpt")
    given = ["--prompt", "a", "--ref", str(sounds / "frame.png"), "--audio", str(sounds / "short.wav")]
    published = ["--model.from_pretrained", str(base), "--model.audio_pretrained", str(tmp_path / "added.ckpt")]
    videos = []
    for weights in (published, ["--ckpt-path", str(trained)]):
        cfg = sampling(tmp_path, *given, *weights)
        videos.append(next(VideoGenerator(cfg, CPU).sample(read_prompts(cfg))).video_CTHW)
    assert torch.equal(*videos)


def test_recorded_numbers_of_frames() -> None:
    """As many as the published code makes of a sound, at every recorded rate and length."""
    cases = json.loads((Path(__file__).parents[1] / "golden/fantasy_a.json").read_text())["num_frames"]
    assert len(cases) > 30
    for case in cases:
        assert frames_of_sound(case["duration"], case["fps"], most=case["max_num_frames"]) == case["out"]


def test_guidance_is_by_text_and_sound(trained: Path, sounds: Path, tmp_path: Path) -> None:
    """u + audio_guidance (d - u) + guidance (c - d), of the model's own velocities."""
    given = ["--prompt", "a red circle", "--ref", str(sounds / "frame.png"), "--audio", str(sounds / "short.wav")]
    cfg = sampling(tmp_path, "--ckpt-path", str(trained), *given, "--num-frames", "5", "--num-steps", "1")
    generator = VideoGenerator(cfg, CPU)
    [prompt] = read_prompts(cfg)
    job = plan(cfg, rt.start())[0]
    inputs, _ = generator._inputs([job], [prompt.text])
    x, conditions = inputs["noise"]["x"], inputs["conditions"]
    assert set(inputs["null_image"]) == {"audio"} and not inputs["null_image"]["audio"].any()
    t = torch.ones(1)
    with torch.no_grad():
        c = generator.model(x, t, conditions)
        d = generator.model(x, t, {**conditions, **inputs["null_text"]})
        u = generator.model(x, t, {**conditions, **inputs["null_text"], **inputs["null_image"]})
        expected = x - (u + 3.0 * (d - u) + 2.0 * (c - d))
        torch.testing.assert_close(generator._denoise(inputs), expected, atol=1e-5, rtol=1e-5)


def test_settings_of_sound_are_not_ignored(trained: Path, sounds: Path, tmp_path: Path) -> None:
    """Sound that is missing, for a run that hears none, beside a csv, and guidance by the frame."""
    given = ["--ckpt-path", str(trained), "--prompt", "a", "--ref", str(sounds / "frame.png")]
    runtime = rt.start()
    with pytest.raises(ValueError, match="has nothing to hear; give --audio"):
        plan(sampling(tmp_path, *given), runtime)
    with pytest.raises(ValueError, match="does not exist"):
        plan(sampling(tmp_path, *given, "--audio", "gone.wav"), runtime)
    with pytest.raises(ValueError, match=r"set guidance_img=1\.0"):
        plan(sampling(tmp_path, *given, "--guidance_img", "3.0"), runtime)
    with pytest.raises(ValueError, match="belongs to --prompt"):
        read_prompts(sampling(tmp_path, "--prompts", "p.csv", "--audio", "a.wav"))
    cfg = sampling(tmp_path, *given, "--audio", str(sounds / "short.wav"))
    deaf = {name: section for name, section in cfg.encoders.items() if name != "audio"}
    with pytest.raises(ValueError, match="the denoiser hears nothing"):
        plan(replace(cfg, encoders=deaf), runtime)


def test_samples_during_training_are_heard(sounds: Path, world: Path) -> None:
    """`sampling` takes one sound for its list of prompts, or a csv; without sound it is refused at the start."""
    config = config_of("--dataset.data_path", str(world / "meta.csv"), "--sample_every", "1")
    settings = {"height": 16, "width": 16, "num_frames": 5, "guidance_img": 1.0}
    heard = replace(config, sampling={**settings, "prompts": ["a", "a"], "audio": str(sounds / "short.wav")})
    assert [prompt.audio for prompt in read_sampling(heard)[1]] == [str(sounds / "short.wav")] * 2
    table = sounds / "watched.csv"
    table.write_text("text,audio\na,long.wav\n")
    assert read_sampling(replace(config, sampling={**settings, "prompts": str(table)}))[1][0].audio.endswith("long.wav")
    with pytest.raises(ValueError, match="nothing to hear"):
        read_sampling(replace(config, sampling={**settings, "prompts": ["a"]}))
