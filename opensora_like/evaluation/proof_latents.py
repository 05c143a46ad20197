"""Reads the truth of the shapes world off latents, where a random autoencoder leaves no pictures to read it off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_like import rng
from opensora_like.config import read_config
from opensora_like.evaluation.demo import read_clips
from opensora_like.evaluation.generate import Frozen, VideoGenerator, build_frozen
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.shapes import ASPECTS, accuracy
from opensora_like.evaluation.world import Combination, combination_of
from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build
from opensora_like.settings import InferenceConfig

RESIDUAL_GAIN = 0.1  # of what a residual block adds: the clip has to come through a network that has learned nothing
NUM_MEASURED, ENCODED_AT_ONCE = 512, 16  # clips
WIDTH = 256  # of the read-out
NOISE = 0.2  # of its training, in deviations of a latent: samples are not quite clips


class Latents(NamedTuple):
    """Latents with their truth, one combination per row."""

    z_BCTHW: Tensor
    truths: Sequence[Combination]


def prepare_autoencoder(config: str, file: Path, table: Path, *, seed: int = 0) -> list[str]:
    """Give the autoencoder of an inference config random weights, and factors for a mean of 0 and unit variance.

    Kernels are orthogonal, so that no direction of the pixels is lost; biases are zero, so that channels differ by the
    clip; residual blocks add little, so that nothing is scrambled. All of it is a function of (seed, name).

    Args:
        file: where the weights are written, so that all processes have the same.
        table: of the clips to train on, of which `NUM_MEASURED` are measured.

    Returns: what to add to the command line, of training as of sampling.
    """
    from safetensors.torch import save_file

    section = {k: v for k, v in _read(config, []).autoencoder.items() if k != "from_pretrained"}
    autoencoder = build(section, MODELS, where="autoencoder")
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            ends_branch = "conv2." in name or "to_out." in name
            generator = rng.generator(seed, f"random autoencoder {name}")
            nn.init.orthogonal_(parameter, gain=RESIDUAL_GAIN if ends_branch else 1.0, generator=generator)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in autoencoder.state_dict().items()}, file)
    unscaled = {"from_pretrained": str(file), "scale_factor": 1.0, "shift_factor": 0.0}
    found = encode_clips(config, _flags(unscaled), table, num=NUM_MEASURED).z_BCTHW
    factors = {"scale_factor": round(1 / found.std().item(), 4), "shift_factor": round(found.mean().item(), 4)}
    return _flags({**unscaled, **factors})


def _read(config: str, arguments: Sequence[str]) -> InferenceConfig:
    return read_config(config, arguments, schema=InferenceConfig).config


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--autoencoder.{key}", str(value))]


@torch.no_grad()
def encode_clips(config: str, arguments: Sequence[str], table: Path, *, num: int | None = None) -> Latents:
    """The latents of the first `num` clips of a table, or of all.

    Args:
        config, arguments: of sampling: the autoencoder, and the height to which clips are brought.
    """
    cfg = _read(config, arguments)
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder")
    clips = read_clips(table, size=cfg.height, num=num)
    videos = torch.stack([torch.as_tensor(video) for video, _ in clips])
    found = [autoencoder.encode(part) for part in videos.split(ENCODED_AT_ONCE)]
    return Latents(torch.cat(found), [truth for _, truth in clips])


class _Undecoded(nn.Module):
    """Stands in an autoencoder's place where latents are sampled, and keeps them instead of decoding them."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.spatial_stride, self.latent_shape = autoencoder.spatial_stride, autoencoder.latent_shape
        self.kept: list[Tensor] = []

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Returns: one black pixel per clip, which nobody looks at."""
        self.kept.append(z_BCTHW.float().cpu())
        return z_BCTHW.new_zeros(len(z_BCTHW), 3, 1, 1, 1)


def sample_latents(config: str, arguments: Sequence[str]) -> Latents:
    """What scripts/diffusion/inference.py would decode."""
    cfg = _read(config, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = build_frozen(cfg, device)
    undecoded = _Undecoded(frozen.autoencoder)
    generator = VideoGenerator(cfg, device, frozen=Frozen(undecoded, frozen.encoders))
    truths = [combination_of(sampled.prompt.text) for sampled in generator.sample(read_prompts(cfg))]
    return Latents(torch.cat(undecoded.kept), truths)


class ReadOut:
    """Names colour, shape and direction of latents: a network with one hidden layer, fitted to clips.

    It always names one of each, as it has seen no other latents than those of clips; see `nearness`.

    Args:
        clips: to learn from.
        steps: of 256 clips each.
    """

    def __init__(self, clips: Latents, *, steps: int = 1000, seed: int = 0) -> None:
        self._names = {a: sorted({getattr(truth, a) for truth in clips.truths}) for a in ASPECTS}
        self._mean, self._std = clips.z_BCTHW.mean(0), clips.z_BCTHW.std()
        labels = {
            a: torch.tensor([names.index(getattr(t, a)) for t in clips.truths]) for a, names in self._names.items()
        }
        inputs, generator = self._inputs(clips.z_BCTHW), rng.generator(seed, "read-out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = sum(map(len, self._names.values()))
            self._net = nn.Sequential(nn.Linear(inputs.shape[1], WIDTH), nn.GELU(), nn.Linear(WIDTH, outputs))
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=2e-3, weight_decay=0.1)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps)) / 2
            rows = torch.randint(len(inputs), (256,), generator=generator)
            noise = NOISE * torch.randn(256, inputs.shape[1], generator=generator)
            logits = self._logits(inputs[rows] + noise)
            loss = sum(F.cross_entropy(logits[a], labels[a][rows]) for a in ASPECTS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def scores(self, latents: Latents) -> dict[str, float]:
        """Shares of latents in which colour, shape and direction are the truth; see `shapes.accuracy`."""
        logits = self._logits(self._inputs(latents.z_BCTHW))
        named = {a: [self._names[a][i] for i in logits[a].argmax(1).tolist()] for a in ASPECTS}
        readings = [dict(zip(ASPECTS, row, strict=True)) for row in zip(*(named[a] for a in ASPECTS), strict=True)]
        return accuracy(readings, latents.truths)

    def _inputs(self, z_BCTHW: Tensor) -> Tensor:
        return ((z_BCTHW - self._mean) / self._std).flatten(1)

    def _logits(self, inputs: Tensor) -> dict[str, Tensor]:
        parts = self._net(inputs).split([len(self._names[a]) for a in ASPECTS], dim=1)
        return dict(zip(ASPECTS, parts, strict=True))


def nearness(found: Tensor, fresh: Tensor, known: Tensor) -> float:
    """How near `found` is to the nearest `known` latents, compared with `fresh` ones.

    Returns: median distance of fresh latents by that of found ones: 1 where they are as near as other clips are, and
        much less where they are latents of no clip.
    """
    flat = known.flatten(1)
    distances = [torch.cdist(z.flatten(1), flat).amin(1).median().item() for z in (fresh, found)]
    return distances[0] / max(distances[1], 1e-12)


def read_samples(config: str, arguments: Sequence[str], *, clips: Path, fresh: Path) -> dict[str, dict[str, float]]:
    """Sample every combination, and read what comes out as latents.

    Args:
        config, arguments: of sampling, without prompts.
        clips: folder of the training clips, as tools/make_shapes.py and tools/meta.py fill it.
        fresh: table of other clips.

    Returns: "fresh" (clips), "seen" and "held_out" (samples): shares as `shapes.accuracy`, and `nearness`.
    """
    known, real = (encode_clips(config, arguments, table) for table in (clips / "meta.csv", fresh))
    read_out, found = ReadOut(known), {"fresh": real}
    for name in ("seen", "held_out"):
        found[name] = sample_latents(config, [*arguments, "--prompts", f"{clips}/{name}.csv"])
    return {
        name: read_out.scores(latents) | {"nearness": nearness(latents.z_BCTHW, real.z_BCTHW, known.z_BCTHW)}
        for name, latents in found.items()
    }
