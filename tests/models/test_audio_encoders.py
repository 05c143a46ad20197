"""Encoders of speech: 50 vectors a second as transformers makes them, clips of any lengths side by side, frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from opensora_like.models.audio_encoders import SAMPLE_RATE, LoudnessEncoder, Wav2Vec2AudioEncoder
from opensora_like.registry import MODELS, build


def tone(seconds: float, *, amplitude: float = 0.5) -> torch.Tensor:
    times = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return amplitude * torch.sin(2 * torch.pi * 220 * times)


@pytest.fixture(scope="module")
def encoder() -> Wav2Vec2AudioEncoder:
    return build({"type": "wav2vec2", "tiny": {}}, MODELS, where="encoders.audio")


def test_vectors_per_second(encoder: Wav2Vec2AudioEncoder) -> None:
    """80 intervals of 23 frames a second give 173 vectors, 81 give 175; float32, and no weight is trained."""
    for intervals, expected in ((80, 173), (81, 175)):
        assert encoder.encode_audio([tone(intervals / 23)], SAMPLE_RATE).shape == (1, expected, encoder.output_dim)
    encoder.train()
    assert not encoder.training and not encoder.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in encoder.parameters())


def test_a_clip_is_encoded_as_if_alone(encoder: Wav2Vec2AudioEncoder) -> None:
    """The shorter one is not changed by what it is filled up with, which are zeros; no vector of sound is all zero."""
    waves = [tone(0.5), torch.cat([tone(0.2), torch.zeros(1600)])]
    together = encoder.encode_audio(waves, SAMPLE_RATE)
    for wave, row in zip(waves, together, strict=True):
        alone = encoder.encode_audio([wave], SAMPLE_RATE)[0]
        assert torch.equal(row[: len(alone)], alone) and not row[len(alone) :].any() and alone.any(dim=1).all()


def test_a_folder_is_read(encoder: Wav2Vec2AudioEncoder, tmp_path: Path) -> None:
    """Weights and preprocessing of a folder give transformers' numbers, with and without normalization."""
    wave = tone(0.3)
    for normalizes in (True, False):
        folder = tmp_path / str(normalizes)
        encoder.model.save_pretrained(folder)
        prepare = Wav2Vec2FeatureExtractor(do_normalize=normalizes)
        prepare.save_pretrained(folder)
        values = prepare(wave.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        with torch.no_grad():
            expected = encoder.model(values).last_hidden_state
        found = Wav2Vec2AudioEncoder(str(folder)).encode_audio([wave], SAMPLE_RATE)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_loudness() -> None:
    """A vector of 20 ms tells the amplitude in decibels and its fall; silence is 0 and still no vector of zeros."""
    wave = torch.cat([tone(0.1, amplitude=1.0), tone(0.1, amplitude=0.1), torch.zeros(1600)])
    found = LoudnessEncoder().encode_audio([wave, wave[:3200]], SAMPLE_RATE)
    assert found.shape == (2, 15, 4) and not found[1, 10:].any()
    loud, quiet, silent = found[0, 1], found[0, 6], found[0, 13]
    assert (loud[1] - quiet[1]).item() == pytest.approx(20 / 60, abs=0.02)
    assert abs(loud[2]) < 0.01 and found[0, 4, 2] < -1 and silent.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_mistakes_are_named(encoder: Wav2Vec2AudioEncoder, tmp_path: Path) -> None:
    """Another rate, a clip that is too short, two channels, and encoders that cannot be built."""
    with pytest.raises(ValueError, match="resample it to 16000"):
        encoder.encode_audio([tone(1.0)], 44_100)
    with pytest.raises(ValueError, match=r"clip 1 .* 400 samples \(25 ms\)"):
        encoder.encode_audio([tone(1.0), torch.zeros(399)], SAMPLE_RATE)
    with pytest.raises(ValueError, match="one channel"):
        LoudnessEncoder().encode_audio([torch.zeros(2, 1600)], SAMPLE_RATE)
    with pytest.raises(ValueError, match="exactly one"):
        Wav2Vec2AudioEncoder()
    with pytest.raises(ValueError, match="hidden_size"):
        Wav2Vec2AudioEncoder(tiny={"hidden": 8})
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Wav2Vec2AudioEncoder(str(tmp_path))
