"""From a batch to what the denoiser is trained on: latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.conditioning import wan_i2v
from opensora_like.conditioning.captioned import check_captioned, check_tasks, encode_captions
from opensora_like.conditioning.masks import check_condition_config, draw_tasks, visual_condition
from opensora_like.conditioning.sharing import Sharing
from opensora_like.conditioning.sound import check_sound, encode_sound, without_sound
from opensora_like.datasets.batch import Batch
from opensora_like.models.autoencoders.posterior import draw_latents
from opensora_like.models.base import ENCODER_METHODS, Autoencoder, Denoiser, TextEncoder, encoders_of
from opensora_like.registry import nearest


@dataclass
class Inputs:
    """One micro-batch at the model's door.

    Args:
        x0_BCTHW: clean latents, float32.
        conditions: by the names the model declares.
        given_BT: True where a latent frame is given (i2v), or None without visual condition.
    """

    x0_BCTHW: Tensor
    conditions: dict[str, Tensor]
    given_BT: Tensor | None = None


class Encode:
    """Runs the frozen encoders; drops captions; draws the task of each sample.

    Every random choice of a sample is a function of (seed, purpose, epoch, row).

    Args:
        encoders: condition name -> text encoder.
        dropout_ratio: condition name -> probability of the null embedding.
        condition_config: task -> relative frequency; None is t2v only.
        guidance: constant for models with a guidance embedding.
        sample_posterior: draw latents from the autoencoder's posterior instead of taking its mean.
        sharing: the ranks with which the samples of each batch are dealt; None encodes them all.
        shapes_only: latents are wanted for their shape; they are zeros where nothing else asks for them.

    Raises:
        ValueError: the model needs a condition that nothing makes, or a setting names a condition it does not take.
    """

    def __init__(
        self,
        model: Denoiser,
        autoencoder: Autoencoder,
        encoders: Mapping[str, TextEncoder],
        *,
        seed: int,
        device: torch.device,
        dropout_ratio: Mapping[str, float],
        condition_config: Mapping[str, float] | None,
        guidance: float,
        sample_posterior: bool,
        sharing: Sharing | None = None,
        shapes_only: bool = False,
    ) -> None:
        self._sharing, self._shapes_only = sharing, shapes_only
        self.autoencoder, self.encoders = autoencoder, dict(encoders)
        self._seed, self._device, self._guidance = seed, device, float(guidance)
        self._dropout, self._sample_posterior = dict(dropout_ratio), sample_posterior
        self._needs_guidance = "guidance" in model.condition_names
        self._needs_visual = "visual" in model.condition_names
        self._tasks = dict(condition_config) if condition_config else {"t2v": 1.0}
        self._grey = self._needs_visual and wan_i2v.takes_grey_clips(model)
        self._names = {kind: encoders_of(kind, self.encoders) for kind in ENCODER_METHODS}
        check_conditions(
            model, autoencoder, self.encoders, dropout_ratio=dropout_ratio, condition_config=condition_config
        )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Inputs:
        video = self._pixels(batch)
        x0 = self._latents(batch, video)
        conditions = {name: self._text(name, batch) for name in self._names["text"]}
        for name in self._names["audio"]:  # by all ranks that share samples: they have all of it, and it is little work
            heard = encode_sound(self.encoders[name], batch.audio)
            conditions[name] = without_sound(heard, self._dropped(name, batch))
        if self._needs_guidance:
            conditions["guidance"] = torch.full((len(batch),), self._guidance, device=self._device)
        given_BT = None
        if self._needs_visual:
            visual, given_BT = self._visual(batch, x0, video)
            conditions |= visual
        return Inputs(x0, conditions, given_BT)

    def _own(self, batch: Batch) -> list[int]:
        """The samples that this rank encodes from pixels."""
        if self._sharing is None or batch.latents_BCTHW is not None:
            return list(range(len(batch)))
        return self._sharing.own(len(batch), batch.index)

    def _joined(self, part: Tensor, batch: Batch) -> Tensor:
        """Of all samples, from what this rank made of its own."""
        if self._sharing is None or batch.latents_BCTHW is not None:
            return part
        return self._sharing.joined(part, len(batch), batch.index)

    def _pixels(self, batch: Batch) -> Tensor | None:
        """Of the samples that this rank encodes, grey where it encodes to no end; None where latents are cached."""
        if batch.latents_BCTHW is not None:
            return None
        own, shape = self._own(batch), batch.shape
        video = batch.video_BCTHW
        if video is not None:
            video = video.to(self._device, non_blocking=True)
        if batch.places is None:
            return video if self._sharing is None else _samples(video, own)
        if missing := len(own) - len(batch.places):
            grey = torch.zeros(missing, 3, shape.num_frames, shape.height, shape.width, device=self._device)
            video = grey if video is None else torch.cat([video, grey])
        return video

    def _latents(self, batch: Batch, video: Tensor | None) -> Tensor:
        """Clean latents in float32, of all samples. Args: video: as `_pixels` gives it."""
        if self._shapes_only and batch.latents_BCTHW is None and (self._grey or not self._needs_visual):
            size = (batch.shape.num_frames, batch.shape.height, batch.shape.width)
            return torch.zeros(len(batch), *self.autoencoder.latent_shape(*size), device=self._device)
        generator = None
        if self._sample_posterior:
            generator = rng.generator(self._seed, "posterior", batch.epoch, batch.rows[0], device=self._device)
        if batch.latents_BCTHW is not None:
            mean = batch.latents_BCTHW.to(self._device, torch.float32, non_blocking=True)
            std = batch.latents_std_BCTHW
            return draw_latents(mean, None if std is None else std.to(self._device, non_blocking=True), generator)
        if self._sharing is None:
            return self.autoencoder.encode(video, generator).float()
        posterior = self.autoencoder.posterior(video)
        whole = [None if part is None else self._joined(part, batch) for part in posterior]
        return draw_latents(*whole, generator)

    def _visual(self, batch: Batch, x0: Tensor, video: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Conditions of the given frames, and which latent frames these are. Args: video: as `_pixels` gives it."""
        generators = [rng.generator(self._seed, "task", batch.epoch, row) for row in batch.rows]
        tasks = draw_tasks(
            self._tasks,
            x0.shape[2],
            generators,
            is_causal=self.autoencoder.is_causal,
            temporal_stride=self.autoencoder.temporal_stride,
        )
        own = self._own(batch)
        tasks = [tasks[i] for i in own]
        if self._grey:
            visual, given_BT = wan_i2v.training_condition(self.autoencoder, video, tasks)
        else:
            references = {name: z.to(self._device, non_blocking=True) for name, z in batch.references.items()}
            latents = _samples(x0, own)
            visual, given_BT = visual_condition(self.autoencoder, video, latents, tasks, references=references)
        found = {"visual": visual}
        for name in self._names["image"]:
            found[name] = self.encoders[name].encode_images(wan_i2v.first_given(video, tasks))
        for name in self._names["captioned image"]:
            dropped = self._dropped(name, batch)
            texts = ["" if dropped[i] else batch.text[i] for i in own]
            found[name] = encode_captions(self.encoders[name], texts, video, tasks)
        return {name: self._joined(part, batch) for name, part in found.items()}, self._joined(given_BT, batch)

    def _text(self, name: str, batch: Batch) -> Tensor:
        """Embeddings of the captions, the dropped ones replaced by the embedding of the empty caption."""
        if name in batch.embeddings:
            embeddings = batch.embeddings[name].to(self._device, non_blocking=True)
        elif self._sharing is None or getattr(self.encoders[name], "tp", False):  # all of its ranks have to call
            embeddings = self.encoders[name].encode(batch.text)
        else:
            own = self.encoders[name].encode([batch.text[i] for i in self._sharing.own(len(batch), batch.index)])
            embeddings = self._sharing.joined(own, len(batch), batch.index)
        if not self._dropout.get(name, 0.0):
            return embeddings
        dropped = torch.from_numpy(self._dropped(name, batch)).to(embeddings.device, non_blocking=True)
        null = self.encoders[name].encode([""])
        return torch.where(dropped.view(-1, *[1] * (embeddings.ndim - 1)), null, embeddings)

    def _dropped(self, name: str, batch: Batch) -> np.ndarray:
        """Which samples lose their caption, or their sound. Returns: bool [B]."""
        drawn = rng.uniform(self._seed, f"drop_{name}", batch.epoch, np.asarray(batch.rows))
        return drawn < self._dropout.get(name, 0.0)


def _samples(whole: Tensor, places: list[int]) -> Tensor:
    """Those at `places`. A list as index is copied to the device, and the host waits until all before it is done."""
    return whole if places == list(range(len(whole))) else torch.stack([whole[i] for i in places])


def check_conditions(
    model: Denoiser,
    autoencoder: Autoencoder,
    encoders: Mapping[str, Any],
    *,
    dropout_ratio: Mapping[str, float],
    condition_config: Mapping[str, float] | None,
) -> None:
    """Whether the settings of `Encode` fit each other; nothing is computed, so weights are not needed.

    Args:
        encoders: condition name -> encoder or its class.

    Raises:
        ValueError: as `Encode`.
    """
    wanted, made = model.condition_names, {*encoders, "guidance", "visual"}
    if missing := sorted(wanted - made):
        raise ValueError(f"encoders: the model needs {missing}, none is configured; add encoders.{missing[0]}")
    if unused := sorted(set(encoders) - wanted):
        raise ValueError(f"encoders.{unused[0]}: the model does not take it; {nearest(unused[0], wanted)}")
    for name, ratio in dropout_ratio.items():
        if name not in encoders:
            raise ValueError(f"dropout_ratio.{name}: there is no such encoder; {nearest(name, encoders)}")
        if name in encoders_of("image", encoders):
            raise ValueError(f"dropout_ratio.{name}: it encodes given frames, which are not dropped; remove it")
        if not 0 <= ratio <= 1:
            raise ValueError(f"dropout_ratio.{name}={ratio} is not a probability; use 0 to 1")
    check_captioned(encoders, wanted)
    check_sound(encoders, wanted)
    tasks = condition_config or {"t2v": 1.0}
    check_tasks(model, tasks, where="condition_config")
    check_condition_config(tasks, is_causal=autoencoder.is_causal, temporal_stride=autoencoder.temporal_stride)
    if set(tasks) != {"t2v"} and "visual" not in wanted:
        raise ValueError(
            f"condition_config has {sorted(tasks)}, but the model takes no visual condition; "
            "set --model.cond_embed True or leave condition_config at None"
        )
