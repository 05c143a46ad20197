"""The process a run lives in: process group, device, logger, metric writers, and the wish to stop."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from opensora_like.publish import staged

logger = logging.getLogger("opensora_like")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(*, timeout_minutes: float = 30.0) -> Runtime:
    """Join the process group that torchrun describes; under plain python, a group of one.

    Args:
        timeout_minutes: after which whoever waits for another rank in vain raises, in this group and in all later ones.

    Raises:
        RuntimeError: more processes on this machine than GPUs, where there are GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= (seen := torch.cuda.device_count()):
            own = "; where each process is shown one of its own (srun --gpus-per-task=1), set LOCAL_RANK=0 for all"
            raise RuntimeError(
                f"process {local_rank} of this machine has no GPU: it sees {seen}; use --nproc_per_node {seen} or fewer"
                f"{own if seen == 1 else ''}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        # every group that we or a backend make later takes torch's own default, 10 minutes with NCCL, and not this one
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        on_cpu = dist.get_world_size() > 1 and not torch.cuda.is_available()
        dist.destroy_process_group()
        if on_cpu:
            # gloo's threads let go of their last tensors on their own, and one that does so while the interpreter ends
            # aborts the process, about once in twenty runs; the collector ends the groups that cycles still hold
            gc.collect()
            time.sleep(0.1)


def set_up_logging(runtime: Runtime, log_file: Path | None = None) -> None:
    """One line per event on stderr, and in `log_file`, from rank 0; other ranks only warn."""
    logger.setLevel(logging.INFO if runtime.is_main else logging.WARNING)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    line = "%(asctime)s %(levelname)s %(message)s"
    if not runtime.is_main:
        line = f"%(asctime)s rank {runtime.rank} %(levelname)s %(message)s"
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and runtime.is_main:
        handlers.append(logging.FileHandler(log_file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def patient_group() -> dist.ProcessGroup:
    """All ranks, for a wait at the end of work whose parts are not equally long; over the CPU. All ranks call it.

    Who dies does not let the others wait for so long: its connections end with it.
    """
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=14))


def broadcast_text(text: str) -> str:
    """Rank 0's text, on every rank."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def found_by_main(find: Callable[[], Path]) -> Path:
    """What rank 0 finds, on all ranks. A run that goes on publishes and removes checkpoints between two looks.

    Raises:
        FileNotFoundError: rank 0 raised it; on all ranks.
    """
    path, problem = "", ""
    if dist.get_rank() == 0:
        try:
            path = str(find())
        except FileNotFoundError as error:
            problem = str(error)
    path, problem = json.loads(broadcast_text(json.dumps([path, problem])))
    if problem:
        raise FileNotFoundError(problem)
    return Path(path)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Element-wise mean of a float tensor over all ranks."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ORPHANED_SECONDS = 1.0  # until a reading process notices that its parent is gone


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Stop signals wait meanwhile; in processes that are started meanwhile, until these call
    `leave_stop_signals_to_parent`."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def leave_stop_signals_to_parent() -> None:
    """Let this process, which reads for one that has a `StopSignal`, go on when both are told to stop.

    Launchers and schedulers tell whole groups of processes (torchrun, ``timeout``, Slurm), and a run whose readers are
    gone cannot make the step after which it saves. SIGTERM ends this process only if it comes from its parent, which
    sends it at its own end and then waits. A parent that was killed sends nothing: then this process ends by itself,
    whatever it is doing, as it holds memory and the lock of the run's folder.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Python's handlers are not told who sent a signal. Blocked, it also breaks off no read of libav.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, ORPHANED_SECONDS)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)  # any other code is reported by the parent's DataLoader as an error


class StopSignal:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an end; all ranks answer at the same step.

    One rank may be told and the others not, so the wish is spread by an all-reduce that runs beside the
    step and is read one step later: it costs no waiting.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> bool:
        """Call once per step on every rank. Returns: True on all of them at once, when any was asked."""
        if self._group is None:
            return self.received is not None
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor([float(self.received is not None)])
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop

    def close(self) -> None:
        """Give the signals back, and let what is in flight end."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._work is not None:
            with contextlib.suppress(RuntimeError):  # a peer is gone; whoever closes is ending, too, for that reason
                self._work.wait(datetime.timedelta(seconds=10))


class MetricWriter(Protocol):
    """Takes the numbers of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per line in `path`.

    Args:
        resume_step: rows of later steps are cut off first: they belong to steps that will be run again.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        kept: list[str] = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
        with staged(path) as draft:
            draft.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{k: v if not _not_finite(v) else str(v) for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(line: str) -> float:
    """Step of a row; a line cut by a kill counts as after everything, so it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


class TensorboardWriter:
    """Tensorboard events in `folder`; rows after `resume_step` are hidden on resume."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run, continued under the same id on resume."""

    def __init__(self, folder: Path, *, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as problem:
            raise ValueError("wandb=True, but wandb is not installed; pip install wandb, or --wandb False") from problem
        run_id = "".join(c if c.isalnum() else "-" for c in name)
        self._run = wandb.init(project=project, name=name, id=run_id, dir=str(folder), config=config, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
