"""Trains the toy config on two ranks that share a sequence, reading dealt and not; for tests/training/test_dealing.py.

python tests/distributed/dealing_cases.py FOLDER

Each run is a folder ``FOLDER/{name}``; every rank adds ``reads.{rank}.json``, the (epoch, row) that it read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.batch import BucketShape, Sample
from opensora_like.datasets.video_io import BadSample
from opensora_like.registry import DATASETS
from opensora_like.training.build import build_run, with_batch_sizes
from opensora_like.training.data import batches_from, build_dataset
from opensora_like.training.trainer import train
from tests.distributed.forks import World
from tests.training.toy_videos import ToyVideos

CONFIG = Path(__file__).parents[1] / "training/toy_config.py"
STEPS = 8
COMMON = [
    "--booster", "{'type': 'ddp', 'sp_size': 2}", "--steps", str(STEPS), "--accumulation-steps", "2",
    "--max-bad-fraction", "1.0", "--ckpt-every", "0", "--ema-decay", "None",
    "--bucket-config", "{'8px_ar1:1': {1: (1.0, 3), 5: (1.0, 1), 9: (0.5, 2)}}",
]  # fmt: skip
BAD = list(range(0, 40, 5))
RUNS = {
    "whole": (False, []),
    "dealt": (True, []),
    "dealt by workers": (True, ["--num-workers", "2"]),
    "whole with bad": (False, ["--dataset", str({"type": "counted_videos", "bad": BAD})]),
    "dealt with bad": (True, ["--dataset", str({"type": "counted_videos", "bad": BAD})]),
    "no spare": (True, ["--dataset", str({"type": "counted_videos", "bad": list(range(40))})]),
}


@DATASETS.register_module("counted_videos")
class CountedVideos(ToyVideos):
    """Toy clips that write down what is read; those of the rows `bad` cannot be."""

    def __init__(self, bad: list[int] | None = None, *, bucket_config: dict, multiple: int, seed: int) -> None:
        super().__init__(bucket_config=bucket_config, multiple=multiple, seed=seed)
        self.bad = frozenset(bad or ())
        self.reads = Path(os.environ["READS"])

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        with self.reads.open("a") as file:
            file.write(json.dumps([epoch, row]) + "\n")
        if row in self.bad:
            raise BadSample(f"{row}.mp4", "is bad")
        return super().read(row, shape, epoch)


def run_case(folder: Path, rank: int, *, dealt: bool, arguments: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    os.environ["READS"] = str(folder / f"reads.{rank}")
    given = ["--outputs", str(folder.parent), "--exp-name", folder.name, "--dataset", "{'type': 'counted_videos'}"]
    config = read_config(CONFIG, [*given, *COMMON, *arguments]).config
    runtime = rt.start()
    run = build_run(config, runtime, config_name=str(CONFIG))
    if not dealt:
        config = with_batch_sizes(config, runtime.world_size)
        dataset = build_dataset(config, multiple=2)
        run.batches = batches_from(config, runtime, dataset, run.plan_of, run.booster, run.state)
    places: list[list[int] | None] = []
    record = run.on_batch
    run.on_batch = lambda batch: (record(batch), places.append(batch.places))
    try:
        train(run)
    except ValueError as problem:
        (folder / f"error.{rank}").write_text(str(problem))
    (folder / f"places.{rank}").write_text(json.dumps(places))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, (dealt, arguments) in RUNS.items():
        run_case(folder / name, rank, dealt=dealt, arguments=arguments)


if __name__ == "__main__":
    given = Path(sys.argv[1])
    codes = World(2, lambda rank: main(rank, given), log=given / "log.txt").join()
    sys.exit((given / "log.txt").read_text() if any(codes) else 0)
