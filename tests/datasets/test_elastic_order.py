"""The steps of a run have one hash, whatever kills, resumes, worlds, workers and prefetching do to it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opensora_like import rng
from opensora_like.datasets import shuffle
from opensora_like.datasets.balance import Balance, balance_plan
from opensora_like.datasets.batch import Sample
from opensora_like.datasets.loader import make_loader
from opensora_like.datasets.plan import Position, advance, rank_stream, steps_in_epoch
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.video_text import VideoText

CONFIG = {"144p": {1: (0.7, 5), 8: ((0.9, 0.2), 3), 16: (0.8, 2)}, "256px": {1: (0.5, 2), 8: (0.5, 2)}}
SEED, MICRO = 3, 8  # micro-batches of a step, in all worlds
WORLDS = (1, 2, 4, 8)


class Noted(VideoText):
    """Reads no pixels: the text of a sample is all that was drawn for it.

    Of a step these are which frames are taken (of which no crop is drawn: it is the middle), whether the caption is
    dropped, and the seeds of the task, t and the noise.
    """

    def read(self, row, shape, epoch):
        values = self.table.row(row)
        frames, fps = self.choose_frames(row, values["num_frames"], values["fps"], shape.num_frames, epoch)
        dropped = bool(rng.uniform(self.seed, "drop_text", epoch, np.array([row]))[0] < 0.3)
        seeds = [rng.seed_of(self.seed, purpose, epoch, row) for purpose in ("task", "t", "noise")]
        facts = [values["path"], list(shape), frames, fps, dropped, seeds]
        return Sample(row=row, text=json.dumps(facts), path=values["path"], video_CTHW=torch.zeros(1, 1, 1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 300 clips, whole and in shards."""
    folder = tmp_path_factory.mktemp("tables")
    draws = np.random.default_rng(0)
    frames = draws.choice([1, 12, 40, 90], 300)
    columns = {
        "path": [f"{i}.mp4" for i in range(300)],
        "text": ["a clip"] * 300,
        "num_frames": frames,
        "height": draws.choice([160, 256], 300),
        "width": draws.choice([256, 320], 300),
        "fps": np.where(frames == 1, math.nan, draws.choice([24.0, 60.0], 300)),
    }
    pq.write_table(pa.table(columns), folder / "clips.parquet")
    write_shards(folder / "clips.parquet", folder=folder / "shards", num_shards=3)
    return folder


@pytest.fixture(params=["random", "balanced", "by bijection", "shards"], scope="module")
def data(folder: Path, request: pytest.FixtureRequest):
    """A dataset and epoch -> its plan, of each of the ways in which an order comes about."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param in ("by bijection", "shards"):
            patch.setattr(shuffle, "SORTED", 6)  # or none of these tables would be large enough
        source = folder / ("shards" if request.param == "shards" else "clips.parquet")
        dataset = Noted(str(source), bucket_config=CONFIG, multiple=16, seed=SEED)
        balance = Balance(np.arange(len(dataset.buckets)) % 7, window=32, group=8)

        def plan_of(epoch: int):
            plan = dataset.plan(epoch)
            return balance_plan(plan, balance, seed=SEED) if request.param in ("balanced", "shards") else plan

        yield dataset, plan_of


def ranks(data, world: int, position: Position, *, micro: int = MICRO, num_workers: int = 0, prefetch_factor: int = 2):
    """One stream of batches per rank; each batch reads as (epoch, index, what was drawn for each of its samples)."""
    dataset, plan_of = data
    options = {"num_workers": num_workers, "prefetch_factor": prefetch_factor}
    for rank in range(world):
        mine = rank_stream(plan_of, position, dp_rank=rank, dp_size=world, accumulation=micro // world)
        batches = make_loader(dataset, mine, **options)
        yield ((batch.epoch, batch.index, sorted(zip(batch.rows, batch.text, strict=True))) for batch in batches)


def steps_of(data, world: int, position: Position, num_steps: int, *, micro: int = MICRO, **how) -> list[str]:
    """A hash of each step: its micro-batches in the order of the plan, the samples of each by row."""
    streams = list(ranks(data, world, position, micro=micro, **how))
    steps = [[next(stream) for stream in streams for _ in range(micro // world)] for _ in range(num_steps)]
    return [hashlib.blake2b(json.dumps(sorted(step)).encode()).hexdigest() for step in steps]


def positions(plan_of, num_steps: int) -> list[Position]:
    """Where each step begins."""
    found = [Position(0, 0)]
    while len(found) < num_steps:
        found.append(advance(found[-1], len(plan_of(found[-1].epoch)), MICRO))
    return found


@pytest.fixture(scope="module")
def whole(data) -> list[str]:
    """The steps of two epochs and two more, of one process that is never killed."""
    _, plan_of = data
    num_steps = sum(steps_in_epoch(len(plan_of(epoch)), MICRO) for epoch in range(2)) + 2
    return steps_of(data, 1, Position(0, 0), num_steps)


def test_steps_are_all_different(whole):
    """Or one hash would prove nothing."""
    assert len(set(whole)) == len(whole) >= 12


def test_a_kill_after_every_step_changes_nothing(data, whole):
    """From the position of each step on, another world makes the steps that are left; epochs' ends are among them."""
    begins = positions(data[1], len(whole))
    assert {p.epoch for p in begins} == {0, 1, 2}
    for done, begin in enumerate(begins):
        world = WORLDS[done % 4]
        assert steps_of(data, world, begin, len(whole) - done) == whole[done:], (done, world)


def test_a_run_that_is_killed_again_and_again(data, whole):
    """Six resumes within two epochs, the world of each another one, so that it changes twice and back."""
    begins, made, worlds = positions(data[1], len(whole)), [], itertools.cycle((4, 1, 8, 2))
    cuts = [0, 2, 3, 4, 5, 9, len(whole)]
    for first, last in itertools.pairwise(cuts):
        made += steps_of(data, next(worlds), begins[first], last - first)
    assert made == whole


def test_a_resume_at_an_epochs_end_begins_the_next(data, whole):
    """A position at or near the end, where no step is left, is the beginning of the next epoch, in every world."""
    plan = data[1](0)
    first = steps_in_epoch(len(plan), MICRO)
    for at in (len(plan), first * MICRO):
        for world in WORLDS:
            assert steps_of(data, world, Position(0, at), 3) == whole[first : first + 3]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("data", ["random"], indirect=True)
@pytest.mark.parametrize(("num_workers", "prefetch_factor"), [(1, 1), (1, 4), (3, 1), (3, 4)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_and_prefetching_change_nothing(data, whole, world, num_workers, prefetch_factor):
    """Loader processes that read ahead, over the end of an epoch too, give the steps that one process gives."""
    first = steps_in_epoch(len(data[1](0)), MICRO) - 2
    begin = positions(data[1], len(whole))[first]
    how = {"num_workers": num_workers, "prefetch_factor": prefetch_factor}
    assert steps_of(data, world, begin, 4, **how) == whole[first : first + 4]


def test_another_step_size_goes_on_without_repeat_or_gap(data):
    """8, then 6, then 5 micro-batches a step within one epoch: each micro-batch once, in order, to the last step."""
    plan = data[1](0)
    position, seen = Position(0, 0), []
    for micro, world, num_steps in ((8, 4, 2), (6, 2, 1), (5, 5, 10**6)):
        num_steps = min(num_steps, steps_in_epoch(len(plan), micro, position.micro_batch))
        streams = list(ranks(data, world, position, micro=micro))
        for _ in range(num_steps):
            seen += sorted(next(stream)[:2] for stream in streams for _ in range(micro // world))
            position = advance(position, len(plan), micro)
    assert seen == [(0, index) for index in range(len(seen))] and len(plan) - len(seen) < 5
    assert position == (1, 0)


def test_the_steps_of_an_epoch_are_known_when_it_begins(data):
    """len(plan) // K are made, for every epoch, though the draws make them of different lengths."""
    lengths = [len(data[1](epoch)) for epoch in range(5)]
    assert len(set(lengths)) > 1
    for world in (2, 8):
        streams = list(ranks(data, world, Position(0, 0)))
        for epoch, length in enumerate(lengths):
            steps = steps_in_epoch(length, MICRO)
            assert steps == length // MICRO
            made = [[next(stream)[:2] for stream in streams for _ in range(MICRO // world)] for _ in range(steps)]
            assert sorted(itertools.chain(*made)) == [(epoch, index) for index in range(steps * MICRO)]


@pytest.mark.parametrize("data", ["random", "shards"], indirect=True)
def test_no_clip_that_fits_a_bucket_is_starved(data):
    """In 20 epochs every clip that has a bucket is seen, those that are drawn and those of small buckets as well."""
    dataset, plan_of = data
    seen: set[int] = set()
    for epoch in range(20):
        plan = plan_of(epoch)
        used = steps_in_epoch(len(plan), MICRO) * MICRO  # what fills no step is not read
        seen |= {row for index in range(used) for row in plan[index].rows.tolist()}
    usable = dataset.table.num_frames // np.where(np.asarray(dataset.table.fps) > 24, 3, 1)
    fits = (usable >= 8) | (dataset.table.num_frames == 1)
    assert fits.sum() > 200 and seen == set(np.flatnonzero(fits).tolist())
