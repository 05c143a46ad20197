"""What is known of a clip from its container: measured by processes, on one machine or many, each bad file alone.

Nothing here needs torch. The engines give the same results, in any order:

- "processes": of this machine; one that is late or dies is replaced.
- "ray": actors of a ray cluster, likewise. The machines need this package and the files under the same paths.
- "pandarallel": for those used to it; a file that hangs or crashes takes the run with it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opensora_like.datasets.video_io import BadSample, probe

Engine = Literal["processes", "pandarallel", "ray"]
START_SECONDS = 60.0  # until a worker begins; its files have their own time
MAX_FAILED_STARTS = 8  # of workers, in a row
CRASHED = "the process that read it crashed"


class Result(NamedTuple):
    """Of one file: what was measured, or why nothing was."""

    num_frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = math.nan
    problem: str = ""


def measure(file: str) -> Result:
    """Measure one file; a bad one is a result too."""
    try:
        return Result(*probe(file))
    except BadSample as problem:
        return Result(problem=problem.reason)


def measure_all(
    files: list[str],
    *,
    num_workers: int | None,
    timeout_seconds: float,
    engine: Engine = "processes",
    work: Callable[[str], Result] = measure,
) -> Iterator[tuple[str, Result]]:
    """Measure files, in any order.

    Args:
        num_workers: processes; 0 is this one (not with ray), None all cores of this machine or of the ray cluster.
        timeout_seconds: for one file. A worker that is late is ended and replaced (not in this process, where
            only a read that blocks is noticed, nor with pandarallel).
        work: measures one file; other processes import it by its name.

    Raises:
        ValueError: an engine that is not installed, or a ray cluster that starts no worker.
    """
    if num_workers is None and engine != "ray":
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not files or (num_workers == 0 and engine != "ray"):
        yield from ((file, work(file)) for file in files)
    elif engine == "ray":
        yield from _measure_with_ray(files, num_workers, timeout_seconds, work)
    elif engine == "pandarallel":
        yield from _measure_with_pandarallel(files, num_workers, work)
    else:
        yield from _measure_in_processes(files, min(num_workers, len(files)), timeout_seconds, work)


def check_engine(engine: Engine) -> None:
    """Raises: ValueError: it is not installed, or does not work here."""
    if engine == "pandarallel":
        _import_pandarallel()
    elif engine == "ray":
        _import_ray()


def _measure_with_pandarallel(
    files: list[str], num_workers: int, work: Callable[[str], Result]
) -> Iterator[tuple[str, Result]]:
    import pandas as pd

    pandarallel = _import_pandarallel()
    pandarallel.initialize(nb_workers=num_workers, progress_bar=False, verbose=1)
    yield from zip(files, pd.Series(files).parallel_apply(work), strict=True)


def _import_pandarallel() -> Any:
    import pandas as pd

    try:
        from pandarallel import pandarallel
    except ImportError as problem:  # 1.6.5 and pandas 3.1, for one
        raise ValueError(
            f"--engine pandarallel: it cannot be imported beside pandas {pd.__version__} ({problem}); "
            f"use --engine processes"
        ) from problem
    return pandarallel


class _Worker:
    """A process that measures what it is sent."""

    def __init__(self, context: Any, work: Callable[[str], Result]) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, work), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process closes the pipe
        self.file = ""  # until it has begun, which it says itself
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, file: str, timeout_seconds: float) -> None:
        self.file, self.deadline = file, time.monotonic() + timeout_seconds
        self.pipe.send(file)

    def receive(self) -> Result | None:
        """What was measured; None if the process has died."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            return None

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _work(pipe: Any, work: Callable[[str], Result]) -> None:
    import av  # noqa: F401 - before it begins, so that no file waits for it

    pipe.send(Result())
    while True:
        try:
            file = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(work(file))


def _measure_in_processes(
    files: list[str], num_workers: int, timeout: float, work: Callable[[str], Result]
) -> Iterator[tuple[str, Result]]:
    context = multiprocessing.get_context("spawn")  # libav and arrow have threads, which do not survive a fork
    waiting = deque(files)
    workers = [_Worker(context, work) for _ in range(num_workers)]
    failed_starts = 0
    try:
        while workers:
            left = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
            ready = connection.wait([worker.pipe for worker in workers], timeout=left)
            for worker in [w for w in workers if w.pipe in ready or w.deadline <= time.monotonic()]:
                result = worker.receive() if worker.pipe in ready else None
                if worker.file:
                    yield worker.file, result or (Result(problem=CRASHED) if worker.pipe in ready else _late(timeout))
                failed_starts = _count_failed(failed_starts, began=result is not None or bool(worker.file))
                if result is not None and waiting:
                    worker.send(waiting.popleft(), timeout)
                    continue
                worker.end()
                workers.remove(worker)
                if waiting:
                    workers.append(_Worker(context, work))
    finally:
        for worker in workers:
            worker.end()


def _count_failed(number: int, *, began: bool) -> int:
    """Workers in a row that did not begin. Raises: ValueError: too many of them."""
    number = 0 if began else number + 1
    if number > MAX_FAILED_STARTS:
        raise ValueError(
            f"{number} workers in a row did not begin within {START_SECONDS:g} s each; what they wrote says why. every "
            f"machine needs this package under the same path"
        )
    return number


def _late(timeout: float) -> Result:
    return Result(problem=f"took over {timeout:g} s")


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as problem:
        raise ValueError(
            f"--engine ray: ray cannot be imported ({problem}); pip install -r requirements/ray.txt, or use "
            "--engine processes"
        ) from problem
    return ray


class _Actor:
    """What ray makes workers of; it lives in a process of its own, on any machine."""

    def begin(self, work: Callable[[str], Result]) -> None:
        """Answers when it has begun."""
        import av  # noqa: F401 - before it begins, so that no file waits for it

    def measure(self, file: str, work: Callable[[str], Result]) -> Result:
        return work(file)


class _RayWorkers:
    """Actors and what each is doing: starting, or measuring a file until a deadline.

    A file whose actor dies is given to another one; if that dies too, it is the file's fault and not a machine's.
    """

    def __init__(self, ray: Any, files: list[str], timeout: float, work: Callable[[str], Result]) -> None:
        self._ray, self._timeout, self._work = ray, timeout, work
        self._make = ray.remote(num_cpus=1, max_restarts=0)(_Actor).remote
        self._waiting = deque(files)
        self._died_over: set[str] = set()
        self._failed_starts = 0
        self._starting: dict[Any, Any] = {}  # what will answer -> its actor
        self._busy: dict[Any, tuple[Any, str, float]] = {}  # what will answer -> actor, file, deadline

    def start(self) -> None:
        actor = self._make()
        self._starting[actor.begin.remote(self._work)] = actor

    def next_results(self) -> list[tuple[str, Result]]:
        """Wait until something happens, and give every free actor a file.

        Raises:
            ValueError: no actor runs, and none has begun in `START_SECONDS`.
        """
        deadline = min((end for *_, end in self._busy.values()), default=time.monotonic() + START_SECONDS)
        pending = [*self._starting, *self._busy]
        left = max(0.0, deadline - time.monotonic())
        done, _ = self._ray.wait(pending, num_returns=1, timeout=left)
        if not done and not self._busy:
            raise ValueError(
                f"--engine ray: none of {len(self._starting)} workers began within {START_SECONDS:g} s; the cluster "
                f"has {self._ray.available_resources().get('CPU', 0):g} free cores, each worker needs one"
            )
        results = [found for answer in done for found in self._take(answer)]
        for answer in [a for a, (*_, end) in self._busy.items() if end <= time.monotonic()]:
            actor, file, _ = self._busy.pop(answer)
            self._ray.kill(actor)
            self.start()
            results.append((file, _late(self._timeout)))
        return results

    def _take(self, answer: Any) -> list[tuple[str, Result]]:
        """What an actor answered; it gets the next file."""
        actor, file, _ = self._busy.pop(answer, (None, "", 0.0))
        actor = actor or self._starting.pop(answer)
        try:
            result = self._ray.get(answer)
            self._failed_starts = _count_failed(self._failed_starts, began=True)
        except self._ray.exceptions.RayTaskError as problem:
            result = Result(problem=f"{CRASHED}: {problem.cause!r}")
        except self._ray.exceptions.RayActorError:
            self._failed_starts = _count_failed(self._failed_starts, began=bool(file))
            self.start()
            if file and file not in self._died_over:
                self._died_over.add(file)
                self._waiting.append(file)
                return []
            return [(file, Result(problem=CRASHED))] if file else []
        if self._waiting:
            following = self._waiting.popleft()
            # another machine has another current folder
            sent = actor.measure.remote(os.path.abspath(following), self._work)  # noqa: PTH100
            self._busy[sent] = (actor, following, time.monotonic() + self._timeout)
        else:
            self._ray.kill(actor)
        return [(file, result)] if file else []

    def end(self) -> None:
        for actor in [*self._starting.values(), *(actor for actor, *_ in self._busy.values())]:
            self._ray.kill(actor)


def _measure_with_ray(
    files: list[str], num_workers: int | None, timeout: float, work: Callable[[str], Result]
) -> Iterator[tuple[str, Result]]:
    """On the cluster of RAY_ADDRESS, the one that runs on this machine, or one that is started for this."""
    ray = _import_ray()
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    workers = _RayWorkers(ray, files, timeout, work)
    try:
        for _ in range(min(num_workers or int(ray.cluster_resources().get("CPU", 1)), len(files))):
            workers.start()
        left = len(files)
        while left:
            for found in workers.next_results():
                left -= 1
                yield found
    finally:
        workers.end()
        if own:
            ray.shutdown()


class Journal:
    """What was measured so far, one line of json per file, so that a run that was cut off can go on."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        if resume and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    file, *values = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run ended
                    continue
                self.results[file] = Result(*(math.nan if value is None else value for value in values))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if resume else "w", encoding="utf-8")

    def add(self, file: str, result: Result) -> None:
        self.results[file] = result
        values = [None if isinstance(value, float) and math.isnan(value) else value for value in result]
        self.file.write(json.dumps([file, *values]) + "\n")
        self.file.flush()

    def remove(self) -> None:
        self.file.close()
        self.path.unlink()
