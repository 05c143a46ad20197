"""From a batch to what the denoiser is trained on: latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.conditioning import wan_i2v
from opensora_like.conditioning.masks import check_condition_config, draw_tasks, visual_condition
from opensora_like.conditioning.sharing import Sharing
from opensora_like.datasets.batch import Batch
from opensora_like.models.autoencoders.posterior import draw_latents
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
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
        sharing: the ranks with which the samples of each batch are dealt for encoding; None encodes them all.

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
    ) -> None:
        self._sharing = sharing
        self.autoencoder, self.encoders = autoencoder, dict(encoders)
        self._seed, self._device, self._guidance = seed, device, guidance
        self._dropout, self._sample_posterior = dict(dropout_ratio), sample_posterior
        self._needs_guidance = "guidance" in model.condition_names
        self._needs_visual = "visual" in model.condition_names
        self._tasks = dict(condition_config) if condition_config else {"t2v": 1.0}
        self._grey = self._needs_visual and wan_i2v.takes_grey_clips(model)
        self._image_encoders = [name for name, encoder in self.encoders.items() if hasattr(encoder, "encode_images")]
        _check_conditions(model.condition_names, self.encoders, self._dropout)
        check_condition_config(
            self._tasks, is_causal=autoencoder.is_causal, temporal_stride=autoencoder.temporal_stride
        )
        if set(self._tasks) != {"t2v"} and not self._needs_visual:
            raise ValueError(
                f"condition_config has {sorted(self._tasks)}, but the model takes no visual condition; "
                "set --model.cond_embed True or leave condition_config at None"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Inputs:
        x0, video = self._latents(batch)
        conditions = {name: self._text(name, batch) for name in self.encoders if name not in self._image_encoders}
        if self._needs_guidance:
            conditions["guidance"] = torch.full((len(batch),), self._guidance, device=self._device)
        given_BT = None
        if self._needs_visual:
            generators = [rng.generator(self._seed, "task", batch.epoch, row) for row in batch.rows]
            tasks = draw_tasks(
                self._tasks,
                x0.shape[2],
                generators,
                is_causal=self.autoencoder.is_causal,
                temporal_stride=self.autoencoder.temporal_stride,
            )
            references = {name: z.to(self._device, non_blocking=True) for name, z in batch.references.items()}
            if self._grey:
                conditions["visual"], given_BT = wan_i2v.training_condition(self.autoencoder, video, tasks)
            else:
                found = visual_condition(self.autoencoder, video, x0, tasks, references=references)
                conditions["visual"], given_BT = found
            for name in self._image_encoders:
                conditions[name] = self.encoders[name].encode_images(wan_i2v.first_given(video, tasks))
        return Inputs(x0, conditions, given_BT)

    def _latents(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Clean latents in float32, and the pixels they come from where there are any."""
        generator = None
        if self._sample_posterior:
            generator = rng.generator(self._seed, "posterior", batch.epoch, batch.rows[0], device=self._device)
        if batch.latents_BCTHW is not None:
            mean = batch.latents_BCTHW.to(self._device, torch.float32, non_blocking=True)
            std = batch.latents_std_BCTHW
            return draw_latents(mean, None if std is None else std.to(self._device, non_blocking=True), generator), None
        video = batch.video_BCTHW.to(self._device, non_blocking=True)
        if self._sharing is None:
            return self.autoencoder.encode(video, generator).float(), video
        posterior = self.autoencoder.posterior(video[self._sharing.own(len(batch))])
        whole = [None if part is None else self._sharing.joined(part, len(batch)) for part in posterior]
        return draw_latents(*whole, generator), video

    def _text(self, name: str, batch: Batch) -> Tensor:
        """Embeddings of the captions, the dropped ones replaced by the embedding of the empty caption."""
        if name in batch.embeddings:
            embeddings = batch.embeddings[name].to(self._device, non_blocking=True)
        elif self._sharing is None or getattr(self.encoders[name], "tp", False):  # all of its ranks have to call
            embeddings = self.encoders[name].encode(batch.text)
        else:
            own = self.encoders[name].encode([batch.text[i] for i in self._sharing.own(len(batch))])
            embeddings = self._sharing.joined(own, len(batch))
        ratio = self._dropout.get(name, 0.0)
        if not ratio:
            return embeddings
        drawn = rng.uniform(self._seed, f"drop_{name}", batch.epoch, np.asarray(batch.rows))
        dropped = torch.from_numpy(drawn < ratio).to(embeddings.device)
        null = self.encoders[name].encode([""])
        return torch.where(dropped.view(-1, *[1] * (embeddings.ndim - 1)), null, embeddings)


def _check_conditions(wanted: frozenset[str], encoders: Mapping, dropout: Mapping[str, float]) -> None:
    made = {*encoders, "guidance", "visual"}
    if missing := sorted(wanted - made):
        raise ValueError(f"encoders: the model needs {missing}, none is configured; add encoders.{missing[0]}")
    if unused := sorted(set(encoders) - wanted):
        raise ValueError(f"encoders.{unused[0]}: the model does not take it; {nearest(unused[0], wanted)}")
    for name, ratio in dropout.items():
        if name not in encoders:
            raise ValueError(f"dropout_ratio.{name}: there is no such encoder; {nearest(name, encoders)}")
        if hasattr(encoders[name], "encode_images"):
            raise ValueError(f"dropout_ratio.{name}: it encodes given frames, which are not dropped; remove it")
        if not 0 <= ratio <= 1:
            raise ValueError(f"dropout_ratio.{name}={ratio} is not a probability; use 0 to 1")
