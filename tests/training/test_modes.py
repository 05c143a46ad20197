"""Modes of training: given frames out of the loss, tasks for clips of any length, images and videos in one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.conditioning.masks import TASKS, draw_tasks
from opensora_like.config import read_config
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.registry import SCHEDULERS, build
from opensora_like.settings import RunConfig
from opensora_like.training.build import build_encode, build_frozen, build_model
from opensora_like.training.errors import ErrorOptions
from opensora_like.training.step import FlowMatchingStep
from opensora_like.training.trainer import train
from tests.training.harness import CONFIG, build_toy, train_toy

CPU = torch.device("cpu")


def config_of(*arguments: str) -> RunConfig:
    return read_config(CONFIG, arguments).config


def batch_of(num_frames: int, *, rows: int = 3) -> Batch:
    video = torch.rand(rows, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers = list(range(rows))
    shape = BucketShape("8px", num_frames, 8, 8)
    text, paths = ["a clip"] * rows, [""] * rows
    return Batch(epoch=0, index=0, shape=shape, rows=numbers, text=text, paths=paths, video_BCTHW=video)


class Zero(torch.nn.Module):
    """Predicts 0 where it is told a frame is made, and nonsense where it is given."""

    def forward(self, x_BCTHW, t_B, conditions):
        mask = conditions["visual"][:, :1]
        return torch.zeros_like(x_BCTHW) + 1000.0 * mask


def loss_of(skip: bool, task: str, num_frames: int) -> float:
    config = config_of("--condition_config", f"{{'{task}': 1.0}}")
    autoencoder, encoders = build_frozen(config, CPU)
    encode = build_encode(config, CPU, build_model(config), autoencoder, encoders)
    scheduler = build(config.scheduler, SCHEDULERS, where="scheduler", patch_size=1)
    step = FlowMatchingStep(
        Zero(), encode, scheduler, seed=0, dtype=torch.float32, errors=ErrorOptions(skip_given=skip)
    )
    return step(batch_of(num_frames)).item()


@pytest.mark.parametrize("task", ["i2v_head", "i2v_tail", "i2v_loop"])
def test_no_i2v_ref_loss_leaves_given_frames_out(task: str) -> None:
    """An error in given frames costs nothing with it and all without it; of images and t2v nothing is left out."""
    with_it, without = loss_of(True, task, 9), loss_of(False, task, 9)
    assert with_it < 10 < 1000 < without
    assert loss_of(True, task, 1) == loss_of(False, task, 1)
    assert loss_of(True, "t2v", 9) == loss_of(False, "t2v", 9)


def test_tasks_that_do_not_fit_a_clip_come_back_for_the_next() -> None:
    """Every published task, short clips first: the config stays as it was, and long clips still get v2v."""
    tasks = dict.fromkeys(TASKS, 1.0)
    config = config_of("--condition_config", str(tasks))
    autoencoder, encoders = build_frozen(config, CPU)
    encode = build_encode(config, CPU, build_model(config), autoencoder, encoders)
    fresh = build_encode(config, CPU, build_model(config), autoencoder, encoders)
    for num_frames in (1, 2, 5, 9, 33, 40, 66, 72):
        encode(batch_of(num_frames, rows=2))
    assert dict(config.condition_config) == tasks and encode._tasks == tasks
    after, alone = encode(batch_of(80, rows=16)), fresh(batch_of(80, rows=16))
    assert torch.equal(after.given_BT, alone.given_BT)
    assert after.given_BT.sum(1).max() > 2  # v2v is among the drawn ones


def test_every_task_is_drawn_for_a_long_clip() -> None:
    """With equal weights, all of them are seen within 200 draws."""
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    drawn = draw_tasks(dict.fromkeys(TASKS, 1.0), 40, generators, is_causal=True, temporal_stride=4)
    assert set(drawn) == set(TASKS)


def test_images_and_videos_train_together(tmp_path: Path) -> None:
    """One run sees batches of 1 and of 9 frames, none mixed; all losses are finite, and images have no given frame."""
    run = build_toy(tmp_path, "--steps", "20")
    seen: dict[int, list[int]] = {}
    inner = run.step_fn

    def step(batch: Batch) -> torch.Tensor:
        frames = batch.video_BCTHW.shape[2]
        inputs = inner.encode(batch)
        seen.setdefault(frames, []).append(int(inputs.given_BT.sum()))
        loss = inner(batch)
        assert torch.isfinite(loss)
        return loss

    run.step_fn = step
    assert train(run)
    assert seen.keys() == {1, 9} and not any(seen[1]) and any(seen[9])


def test_images_alone_train_a_model_that_takes_frames(tmp_path: Path) -> None:
    """An image stage before a video stage: no video bucket is needed."""
    run = train_toy(tmp_path, "--steps", "3", "--bucket_config", "{'8px_ar1:1': {1: (1.0, 3)}}")
    assert run.state.step == 3
