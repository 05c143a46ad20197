"""What a step costs beside the model: the loop against bare forward, backward and update, in one run.

python tools/bench_trainer.py CONFIG [--num_steps N] [--key value ...]     (overrides as in train.py)
Bare and whole steps alternate in blocks, so that both see the same machine; one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable

from opensora_like import runtime as rt
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.settings import RunConfig
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train

NUM_BLOCKS = 4


def build_silent(cfg: RunConfig, runtime: rt.Runtime, *, config_name: str) -> Run:
    """A run that writes nothing but its folder; `train` may be called on it again and again."""
    run = build_run(cfg, runtime, config_name=config_name)
    run.checkpoints.save = lambda state: None  # the save at the end of a block is not a step
    run.writers, run.lock = [], None  # a block closes them
    return run


def bare_seconds(run: Run, num_steps: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Forward, backward and update on inputs that are already there."""
    batch = next(run.batches)
    inputs = run.step_fn.encode(batch)
    x0 = inputs.x0_BCTHW
    t_B = x0.new_full((len(batch),), 0.5)
    began = clock()
    for _ in range(num_steps):
        with run.booster.micro_batch(last=True):
            prediction = run.step_fn.model(x0, t_B, inputs.conditions)
            run.booster.backward((prediction.float() - x0).square().mean())
        run.booster.step()
    return clock() - began


def whole_seconds(run: Run, num_steps: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """The same number of steps of the training loop, from the file to the metrics."""
    run.schedule.total_steps = run.state.step + num_steps
    began = clock()
    train(run)
    return clock() - began


def parser_of(name: str, doc: str | None, *, num_steps: int) -> argparse.ArgumentParser:
    """Of a command with a config; what it does not know are overrides."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=name, description=doc, usage=argparse.SUPPRESS, **layout)
    parser.add_argument("config")
    parser.add_argument("--num_steps", type=int, default=num_steps, help=f"of each kind; default {num_steps}")
    return parser


def prepare(arguments: list[str]) -> Callable[[], int]:
    given, overrides = parser_of("bench_trainer.py", __doc__, num_steps=100).parse_known_args(arguments)
    folder = tempfile.mkdtemp()
    own = ["--outputs", folder, "--exp_name", "bench", "--tensorboard", "False", "--ckpt_every", "0"]
    config = read_config(given.config, [*overrides, *own]).config
    run = build_silent(config, rt.start(), config_name=given.config)

    def work() -> int:
        block = max(1, given.num_steps // NUM_BLOCKS)
        bare_seconds(run, 3), whole_seconds(run, 3)  # warm up
        bare, whole = 0.0, 0.0
        for _ in range(NUM_BLOCKS):
            bare += bare_seconds(run, block)
            whole += whole_seconds(run, block)
        steps = block * NUM_BLOCKS
        per_step = 1000 / steps
        print(f"bare model {bare * per_step:.2f} ms, whole step {whole * per_step:.2f} ms over {steps} steps")
        print(f"beside the model: {(whole - bare) * per_step:.2f} ms, {whole / bare - 1:.1%} of the model's time")
        rt.finish()
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
