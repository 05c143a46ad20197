"""The protocol of a training backend, and how tensors are laid out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
BESIDE = "critic."  # begins the names of a model that is trained beside the denoiser; who samples leaves it out


class ShardRange(NamedTuple):
    """Which part of a parameter this rank owns: a contiguous range of the whole tensor, flattened (row major).

    Every backend can say what it owns in these terms, so checkpoints, EMA and export are written once.
    """

    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element owned
    stop: int  # one past the last; stop == start where the rank owns nothing of it

    @property
    def strips(self) -> tuple[Strip, ...]:
        """The same in the general form."""
        length = self.stop - self.start
        return (Strip(self.start, length, 0, length, length, 1),) if length else ()


class Strip(NamedTuple):
    """`count` runs of `length` elements, evenly spaced in the whole tensor and in the shard, both flattened: a box.

    Run i is [start + i * stride, + length) of the whole and [at + i * step, + length) of the shard.
    """

    start: int
    stride: int
    at: int
    step: int
    length: int
    count: int


class ShardStrips(NamedTuple):
    """Which part of a parameter this rank owns where it is no contiguous range, as of a matrix cut along its columns.

    The shard is flat and in the order in which the rank holds it; the strips fill it without overlap.
    """

    shape: tuple[int, ...]  # of the whole parameter
    strips: tuple[Strip, ...]


class Booster(Protocol):
    """A training backend. It owns the wrapped model and its optimizer after `prepare`.

    A backend that cannot honour its config raises ValueError when it is built, not later.

    It may have three attributes more: ``tensor_group``, the ranks that share linears and read the same samples (or
    None), over which encoders can be cut; ``loads_in_parts``, True where a rank needs less host memory for a model
    on ``meta`` whose parts it reads than for a whole one; and ``shard_frozen(model)``, which cuts up a denoiser that is
    only asked.
    """

    dp_rank: int  # which slice of every global batch this process reads
    dp_size: int  # how many slices there are; under sequence parallelism less than the world size

    def prepare(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Shard, wrap and move `model` (float32, on the CPU or on ``meta``). Returns: what the step calls."""

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups; the loop writes ``lr`` into them before every step."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward; only the `last` of a step needs to reduce gradients."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, a float32 scalar already divided by the accumulation steps."""

    def step(self) -> float:
        """Average gradients over data-parallel ranks, clip, update, clear them.

        A norm that is not finite leaves weights and optimizer as they were.

        Returns: the global L2 norm of the gradients before clipping, the same on every rank.
        """

    def ranges(self) -> dict[str, ShardRange | ShardStrips]:
        """What this rank owns, for every trainable parameter by its plain name. Ranks together own all, once.

        Only tensor parallelism needs strips.
        """

    def master_shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's float32 weights, flat, laid out as `ranges`; live views. The EMA averages these."""

    def optimizer_shards(self) -> dict[str, dict[str, Tensor]]:
        """State name (``exp_avg``...) -> parameter name -> float32 tensor, flat as `ranges`; live views.

        Scalars that count (AdamW's ``step``) are tensors of no dimension. Made if no step was taken yet.
        """

    def refresh(self) -> None:
        """Make the working weights equal to the masters, after a load wrote into the views."""

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors from tensors laid out as `ranges`. Returns: {} except on rank 0."""
