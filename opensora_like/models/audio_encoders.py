"""Frozen encoders of speech: what a denoiser hears of a clip's sound.

Letters of the shape suffixes: B batch, S audio samples, K vectors, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opensora_like.registry import MODELS, nearest

SAMPLE_RATE = 16_000  # samples per second that all encoders take
TINY = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "conv_dim": 8, "seed": 0}
HOP = 320  # samples from one vector to the next: 50 vectors a second
QUIET_DB = 60.0  # below full scale; the loudness encoder hears nothing below
AROUND, RISE = 3, 4.0  # vectors on either side between which a rise is measured, and its factor


@MODELS.register_module("wav2vec2")
class Wav2Vec2AudioEncoder(nn.Module):
    """Vectors of the last layer of transformers' ``Wav2Vec2Model``, about 50 a second, in float32.

    Args:
        from_pretrained: folder of weights and ``preprocessor_config.json``; FantasyTalking takes wav2vec2-base-960h.
        tiny: instead: sizes of an encoder with fixed random weights; any of hidden_size, num_layers, num_heads,
            conv_dim, seed. ``{}`` takes the defaults. For tests.

    Raises:
        ValueError: both or neither of `from_pretrained` and `tiny`, a size that does not exist.
        FileNotFoundError: there is no such folder.

    Source: wav2vec 2.0, arXiv:2006.11477; Fantasy-AMAP/fantasy-talking:infer.py.
    """

    def __init__(self, from_pretrained: str | None = None, *, tiny: dict[str, int] | None = None) -> None:
        super().__init__()
        if (from_pretrained is None) == (tiny is None):
            raise ValueError(
                f"wav2vec2 encoder: from_pretrained={from_pretrained!r} and tiny={tiny!r}; give exactly one of a"
                " folder and the sizes of a tiny random encoder"
            )
        self.model, self._normalizes = _tiny(tiny) if tiny is not None else _load(str(from_pretrained))
        self.model.float().requires_grad_(False).eval()
        self.output_dim = int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> Wav2Vec2AudioEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode_audio(self, waveforms: Sequence[Tensor], sample_rate: int) -> Tensor:
        """Embeddings of sound.

        Each clip is encoded alone: the encoder has no mask, so it would hear what shorter clips are filled up with.

        Args:
            waveforms: [S] each, in [-1, 1], of any lengths.
            sample_rate: of all, `SAMPLE_RATE`.

        Returns: float32 [B, K, D] on the encoder's device, zero beyond each clip's end.

        Raises:
            ValueError: another sample rate, or a clip too short for one vector.
        """
        least, config = 1, self.model.config
        for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
            least = (least - 1) * stride + kernel
        check_waveforms(waveforms, sample_rate, least=least, where="wav2vec2 encoder")
        device = next(self.model.parameters()).device
        found = []
        for wave in waveforms:
            wave = wave.to(device, torch.float32, non_blocking=True)
            if self._normalizes:
                wave = (wave - wave.mean()) / torch.sqrt(wave.var(unbiased=False) + 1e-7)
            found.append(self.model(wave[None]).last_hidden_state[0])
        return pad_sequence(found, batch_first=True)


@MODELS.register_module("loudness")
class LoudnessEncoder(nn.Module):
    """Four numbers 50 times a second: 1, loudness, how it rises, and amplitude.

    Loudness goes with the decibels from 0 (-60 dB) to 1 (full scale). It has no weights; for demos and tests, where the
    truth is how loud a clip is. A denoiser that attends to a set of vectors does not know which of them comes first:
    that loudness rises is said by the vectors themselves, as those of a trained encoder say more than one moment, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output_dim = 4
        # modules without tensors do not know their device
        self.register_buffer("one", torch.ones(()), persistent=False)

    @torch.no_grad()
    def encode_audio(self, waveforms: Sequence[Tensor], sample_rate: int) -> Tensor:
        """Returns and raises: as `Wav2Vec2AudioEncoder.encode_audio`; a vector is of the 20 ms from its time on."""
        check_waveforms(waveforms, sample_rate, least=HOP, where="loudness encoder")
        found = []
        for wave in waveforms:
            blocks = wave.to(self.one.device, torch.float32, non_blocking=True)[: len(wave) // HOP * HOP].view(-1, HOP)
            rms_K = blocks.square().mean(dim=1).sqrt()
            decibel_K = (1 + 20 * torch.log10(rms_K.clamp_min(1e-9)) / QUIET_DB).clamp(0, 1)
            ends = torch.arange(len(decibel_K), device=decibel_K.device)
            after, before = (decibel_K[(ends + side).clamp(0, len(ends) - 1)] for side in (AROUND, -AROUND))
            found.append(torch.stack([torch.ones_like(rms_K), decibel_K, RISE * (after - before), rms_K], dim=1))
        return pad_sequence(found, batch_first=True)


def check_waveforms(waveforms: Sequence[Tensor], sample_rate: int, *, least: int, where: str) -> None:
    """Refuse what an encoder cannot hear.

    Raises:
        ValueError: another sample rate than `SAMPLE_RATE`, more than one channel, or fewer than `least` samples.
    """
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"{where}: sound at {sample_rate} samples a second; resample it to {SAMPLE_RATE}")
    for number, wave in enumerate(waveforms):
        if wave.ndim != 1 or len(wave) < least:
            raise ValueError(
                f"{where}: clip {number} of the batch has the shape {tuple(wave.shape)}, one channel of {least} samples"
                f" ({1000 * least / SAMPLE_RATE:g} ms) or more is needed"
            )


def _load(source: str) -> tuple[nn.Module, bool]:
    """The model, and whether its sound is brought to mean 0 and variance 1."""
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    for name in ("config.json", "preprocessor_config.json"):
        if not (Path(source) / name).is_file():
            raise FileNotFoundError(
                f"wav2vec2 encoder: from_pretrained={source!r} has no {name}; give the folder of"
                " facebook/wav2vec2-base-960h"
            )
    prepare = Wav2Vec2FeatureExtractor.from_pretrained(source)
    if prepare.sampling_rate != SAMPLE_RATE:
        raise ValueError(
            f"wav2vec2 encoder: from_pretrained={source!r} takes {prepare.sampling_rate} samples a second, here they"
            f" are {SAMPLE_RATE}; take another encoder"
        )
    return Wav2Vec2Model.from_pretrained(source), bool(prepare.do_normalize)


def _tiny(tiny: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    for key in tiny:
        if key not in TINY:
            raise ValueError(f"wav2vec2 encoder: tiny has no {key!r}; {nearest(key, TINY)}")
    sizes = {**TINY, **tiny}
    config = Wav2Vec2Config(
        hidden_size=sizes["hidden_size"],
        intermediate_size=2 * sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        conv_dim=(sizes["conv_dim"],) * 7,  # with the published kernels and strides: as many vectors a second
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes["seed"])
        return Wav2Vec2Model(config), True
