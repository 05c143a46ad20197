"""Clips with sound: frames and sound are cut together to the sample, from any container; what is bad has a reason."""

from __future__ import annotations

import csv
import json
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.datasets.audio_io import SAMPLE_RATE, read_sound, sound_seconds
from opensora_like.datasets.batch import BucketShape
from opensora_like.datasets.dealing import make_dealt_loader
from opensora_like.datasets.loader import make_loader
from opensora_like.datasets.video_io import BadSample
from opensora_like.datasets.video_speech import VideoSpeech
from opensora_like.registry import DATASETS, build
from tests.make_clips import numbered_frames, numbers_of, write_clip

FPS, NUM_FRAMES = 20, 80
BUCKETS = {"64x64": {5: (1.0, 2)}}
SHAPE = BucketShape("64x64", 5, 64, 64)


def write_wav(path: Path, samples: np.ndarray, *, rate: int, channels: int = 1) -> Path:
    """Write samples [S] in [-1, 1] as 16 bits, the same in all channels."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.repeat(samples, channels) * 32767).astype("<i2").tobytes())
    return path


def staircase(seconds: float, rate: int) -> np.ndarray:
    """A sound that tells its time: 20 ms of a tone at the beginning of each frame, louder from frame to frame."""
    times = np.arange(round(seconds * rate)) / rate
    frame = np.floor(times * FPS + 1e-9)
    is_on = times * FPS - frame < 0.4
    return (frame + 1) / (NUM_FRAMES + 1) * 0.9 * is_on * np.sin(2 * np.pi * 500 * times)


def frame_of(sound: np.ndarray) -> list[int]:
    """Of each 1/20 s, the frame that its loudness tells, provided that it begins with the tone."""
    found = []
    for part in sound.reshape(-1, SAMPLE_RATE // FPS):
        loud, silent = np.abs(part[:320]), np.abs(part[340:])
        assert loud.max() > 0.005 > silent.max(), "the tone is not at the beginning of the frame"
        found.append(round(loud.max() / 0.9 * (NUM_FRAMES + 1) - 1))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    write_clip(root / "clip.mp4", numbered_frames(NUM_FRAMES, 64, 64), fps=FPS)
    seconds = NUM_FRAMES / FPS
    for name, rate, channels in (("16k", 16_000, 1), ("44k", 44_100, 2), ("8k", 8_000, 1)):
        write_wav(root / f"{name}.wav", staircase(seconds, rate), rate=rate, channels=channels)
    write_wav(root / "short.wav", staircase(0.15, 16_000), rate=16_000)
    (root / "noise.wav").write_bytes(b"RIFF no sound at all")
    return root


def table(folder: Path, rows: list[dict], name: str = "table.csv") -> str:
    known = {"path": "clip.mp4", "text": "a clip", "num_frames": NUM_FRAMES, "height": 64, "width": 64, "fps": FPS}
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*known, "audio_path"])
        writer.writeheader()
        writer.writerows({**known, **row} for row in rows)
    return str(folder / name)


def dataset(path: str, **options) -> VideoSpeech:
    section = {"type": "video_speech", "data_path": path, **options}
    return build(section, DATASETS, where="dataset", bucket_config=BUCKETS, multiple=16, seed=0)


@pytest.mark.parametrize("sound", ["16k.wav", "44k.wav"])
@pytest.mark.parametrize("fps_max", [20.0, 10.0, 5.0])
def test_sound_belongs_to_its_frames(folder: Path, sound: str, fps_max: float) -> None:
    """From the first frame on, as long as all are shown, at any stride; each sample's tone is that of its frame."""
    data = dataset(table(folder, [{"audio_path": sound}]), fps_max=fps_max)
    stride = int(FPS // fps_max)
    for epoch in range(4):
        sample = data.read(0, SHAPE, epoch)
        frames = ((sample.video_CTHW.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        numbers = numbers_of(frames)
        assert sample.audio.shape == (5 * stride * SAMPLE_RATE // FPS,) and sample.audio.dtype == torch.float32
        heard = frame_of(sample.audio.numpy())
        assert heard[::stride] == numbers and heard == list(range(numbers[0], numbers[0] + 5 * stride))


@pytest.mark.parametrize("name", ["16k.wav", "44k.wav", "8k.wav"])
def test_seeking_gives_what_reading_all_gives(folder: Path, name: str) -> None:
    """Of a stretch from the middle, whatever the rate of the file; to the sample where it is not resampled."""
    whole = read_sound(folder / name, 0.0, 4 * SAMPLE_RATE)
    for start in (0.0, 0.1, 1.23456, 3.0):
        first = round(start * SAMPLE_RATE)
        part = read_sound(folder / name, start, 8_000)
        # between the samples of another rate a stretch may begin half a sample off
        tolerance = 0 if name == "16k.wav" else 0.15
        np.testing.assert_allclose(part[400:-400], whole[first : first + 8_000][400:-400], atol=tolerance)
    assert sound_seconds(folder / name) == pytest.approx(4.0)


def test_sound_of_the_video_itself(folder: Path) -> None:
    """A table may name the video: a compressed track is entered by seeking, and a click stays where it was."""
    import av

    samples = np.zeros(4 * SAMPLE_RATE, np.float32)
    click = 2 * SAMPLE_RATE + 1234
    samples[click : click + 40] = 0.9
    path = folder / "sounding.mp4"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=Fraction(FPS))
        pictures.height = pictures.width = 64
        sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for pixels in numbered_frames(NUM_FRAMES, 64, 64):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    found = read_sound(path, 1.5, SAMPLE_RATE)
    assert abs(int(np.abs(found).argmax()) - (click + 20 - 24_000)) < 40
    data = dataset(table(folder, [{"path": "sounding.mp4", "audio_path": "sounding.mp4"}]))
    assert data.read(0, SHAPE, 0).audio.shape == (4_000,)


def test_what_is_bad_has_a_reason(folder: Path) -> None:
    """A sound that is missing, too short, none, or not named: a bad sample, replaced by the next row of the bucket."""
    paths = ["16k.wav", "gone.wav", "short.wav", "noise.wav", "clip.mp4", ""]
    rows = [{"audio_path": path} for path in paths]
    data = dataset(table(folder, rows))
    reasons = {1: "no such file", 2: "ends at 0.150 s", 3: "not a sound file", 4: "no sound in it", 5: "no audio_path"}
    for row, reason in reasons.items():
        with pytest.raises(BadSample, match=reason):
            data.read(row, SHAPE, epoch=0)
    good = dataset(table(folder, [rows[0], rows[1], rows[0], rows[0]]))
    batches = list(make_loader(good, list(good.plan(0)), num_workers=0))
    assert [len(batch) for batch in batches] == [2, 2] and sum(len(batch.bad) for batch in batches) >= 1
    assert all(len(batch.audio) == 2 and batch.audio[0].shape == (4_000,) for batch in batches)
    assert any(tensor is batches[0].audio[0] for tensor in batches[0].tensors())
    assert batches[0].to(torch.device("cpu")).audio[1].shape == (4_000,)


def test_a_sound_may_end_within_the_last_frame(folder: Path) -> None:
    """What is missing of the last frame is silent; more than a frame is too short."""
    write_wav(folder / "cut.wav", staircase(3.96, 16_000), rate=16_000)
    sound = read_sound(folder / "cut.wav", 3.75, 4_000, may_lack_seconds=1 / FPS)
    assert not sound[-640:].any() and sound[:3_000].any()
    with pytest.raises(BadSample, match=r"ends at 3\.960 s"):
        read_sound(folder / "cut.wav", 3.75, 4_000)
    with pytest.raises(BadSample, match="are wanted"):
        read_sound(folder / "cut.wav", 5.0, 4_000, may_lack_seconds=1.0)


def test_rates_may_differ_within_a_batch(folder: Path) -> None:
    """As many frames last longer at a lower rate: each sample has the sound of its own time."""
    write_wav(folder / "long.wav", np.zeros(8 * SAMPLE_RATE), rate=SAMPLE_RATE)
    rows = [{"audio_path": "long.wav", "fps": fps} for fps in (20, 10, 20, 10)]
    data = dataset(table(folder, rows))
    lengths = {len(data.read(row, SHAPE, 0).audio) for row in range(4)}
    assert lengths == {4_000, 8_000}
    batch = next(iter(make_loader(data, list(data.plan(0)), num_workers=1)))
    assert [len(sound) for sound in batch.audio] == [8_000 if row % 2 else 4_000 for row in batch.rows]


def test_tables_are_checked(folder: Path) -> None:
    """No column, and buckets of single frames; json tables have the same column."""
    plain = {"path": "clip.mp4", "text": "a", "num_frames": NUM_FRAMES, "height": 64, "width": 64, "fps": FPS}
    (folder / "plain.json").write_text(json.dumps([plain]))
    with pytest.raises(ValueError, match="needs the column 'audio_path'"):
        dataset(str(folder / "plain.json"))
    (folder / "speech.json").write_text(json.dumps([{**plain, "audio_path": "16k.wav"}]))
    assert dataset(str(folder / "speech.json")).read(0, SHAPE, 0).audio is not None
    section = {"type": "video_speech", "data_path": str(folder / "speech.json")}
    with pytest.raises(ValueError, match=r"bucket_config\.64x64\.1"):
        build(section, DATASETS, where="dataset", bucket_config={"64x64": {1: (1.0, 1)}}, multiple=16, seed=0)


class OneRank:
    """A `Dealing` of a rank that shares with nobody."""

    rank = 0

    def places(self, num_samples: int, index: int) -> list[int]:
        return list(range(num_samples))

    def owner(self, place: int, index: int) -> int:
        return 0

    def everyone(self, value):
        return [value]


def test_sound_is_dealt_with_its_clip(folder: Path) -> None:
    """Ranks that share batches have the sound of all samples, bad rows replaced as in the plain loader."""
    data = dataset(table(folder, [{"audio_path": name} for name in ("16k.wav", "gone.wav", "44k.wav", "16k.wav")]))
    plan = list(data.plan(0))
    dealt = list(make_dealt_loader(data, plan, OneRank()))
    for mine, plain in zip(dealt, make_loader(data, plan), strict=True):
        assert mine.rows == plain.rows and mine.bad == plain.bad and mine.places == [0, 1]
        assert all(torch.equal(a, b) for a, b in zip(mine.audio, plain.audio, strict=True))
