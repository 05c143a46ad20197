"""Kill a live run at random, again and again, resume it, and compare its end with a run that nobody killed.

python tools/kill_storm.py FOLDER [--config tests/training/toy_config.py] [--kills 100] [--processes 2] [--steps 40]

Every kill is a SIGKILL of one rank or of all, at a random time of the run's life, starting included. When a run
reaches its end before all kills are spent, another begins. Exits with 1 where a complete checkpoint was lost or
damaged, or where an end differs in a bit. For CPU runs: ranks are forks of this process, so that starting is cheap.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # an optimizer imports it when it is made; here, so that forks have it

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import damage
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.cli import run_guarded
from opensora_like.config import read_config
from opensora_like.runtime import start
from opensora_like.training.build import build_frozen, build_model, build_run
from opensora_like.training.trainer import train
from tests.distributed.forks import World


class Storm:
    """One config under fire.

    Args:
        folder: everything goes here; it is emptied.
    """

    def __init__(self, folder: Path, config: Path, *, processes: int, steps: int, seed: int) -> None:
        self.folder, self._config, self._processes, self._steps = folder, config, processes, steps
        self._random = random.Random(seed)
        self.kills = self.resumes = self.rounds = 0
        self._seen: dict[str, set[str]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def start(self, name: str) -> World:
        """A life of run `name`, resumed where there is something to resume."""
        arguments = ["--outputs", str(self.folder), "--exp-name", name, "--steps", str(self._steps)]
        arguments += ["--ckpt-every", "2", "--async-io"]
        if layout.complete_checkpoints(self.folder / name):
            arguments += ["--load", "latest"]
            self.resumes += 1
        cfg = read_config(self._config, arguments).config

        def work(rank: int) -> None:
            train(build_run(cfg, start(), config_name=str(self._config)))

        return World(self._processes, work, log=self.folder / f"{name}.log")

    def reference(self) -> float:
        """The run that nobody kills. Returns: its seconds.

        Raises:
            RuntimeError: it does not reach its end.
        """
        began = time.monotonic()
        if any(codes := self.start("reference").join(600)):
            raise RuntimeError(f"the reference run ended with {codes}; see {str(self.folder / 'reference.log')!r}")
        return time.monotonic() - began

    def one_round(self, kills: int, seconds: float) -> list[str]:
        """One run, killed at most `kills` times, to its end. Returns: what was wrong.

        Args:
            seconds: that a run without kills takes.
        """
        name, problems = f"storm{self.rounds}", []
        self.rounds += 1
        while True:
            world = self.start(name)
            if kills > 0:
                until = time.monotonic() + self._random.uniform(0, 0.6) * seconds
                while time.monotonic() < until and not world.poll():
                    time.sleep(0.005)
                if not world.poll():
                    everyone = list(range(self._processes))
                    world.kill(everyone if self._random.random() < 0.5 else [self._random.choice(everyone)])
                    kills, self.kills = kills - 1, self.kills + 1
            codes = world.join(300, grace_seconds=5)
            problems += self.losses(name)
            if not any(codes):
                return problems + self.differences(name)
            if not any(code < 0 for code in codes):
                return [*problems, f"{name}: ended with {codes} without having been killed; see {name}.log"]

    def losses(self, name: str) -> list[str]:
        """Complete checkpoints that are gone, and new ones that are not whole."""
        now = {f.name for f in layout.complete_checkpoints(self.folder / name)}
        before = self._seen.get(name, set())
        self._seen[name] = now
        found = [f"{name}: {lost} was complete and is gone" for lost in sorted(before - now)]
        return found + [p for new in sorted(now - before) for p in damage(self.folder / name / new, 0, 1)]

    def differences(self, name: str) -> list[str]:
        """How the end of a run differs from the reference's, in any bit of any tensor."""
        mine, theirs = (self._final(n) for n in (name, "reference"))
        if mine.keys() != theirs.keys():
            return [f"{name}: other tensors than the reference: {sorted(mine.keys() ^ theirs.keys())[:5]}"]
        return [f"{name}: {key} differs from the reference" for key in mine if not torch.equal(mine[key], theirs[key])]

    def _final(self, name: str) -> dict[str, torch.Tensor]:
        newest = layout.complete_checkpoints(self.folder / name)[-1]
        reader = PieceReader(newest)
        found = {f"{kind}/{n}": reader.read_whole(kind, n) for kind in reader.kinds() for n in reader.names(kind)}
        return found | {"step": torch.tensor(layout.step_of(newest))}


def preload(config: Path) -> None:
    """Import what a run imports, by building its parts once."""
    cfg = read_config(config, []).config
    build_model(cfg)
    build_frozen(cfg, torch.device("cpu"))


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=Path("tests/training/toy_config.py"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more kills after this time")
    given = parser.parse_args(arguments)
    preload(given.config)
    storm = Storm(given.folder, given.config, processes=given.processes, steps=given.steps, seed=given.seed)

    def work() -> int:
        began = time.monotonic()
        seconds = storm.reference()
        print(f"reference: {given.steps} steps in {seconds:.1f} seconds", flush=True)
        problems: list[str] = []
        while storm.kills < given.kills and time.monotonic() - began < 60 * given.minutes:
            problems += storm.one_round(min(given.kills - storm.kills, 25), seconds)
            print(f"kills {storm.kills} resumes {storm.resumes} runs ended {storm.rounds}", flush=True)
        for problem in problems:
            print(problem)
        took = time.monotonic() - began
        print(f"kills {storm.kills} runs {storm.rounds} problems {len(problems)} in {took:.0f} seconds")
        return 1 if problems else 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
