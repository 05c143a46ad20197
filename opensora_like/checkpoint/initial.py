"""Builds a model on ``meta`` and remembers how each parameter would have begun, to make a few of them for real."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from opensora_like import rng


class _Step(NamedTuple):
    """An operation that made a tensor, or changed it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self, value: Tensor | None) -> Tensor:
        """On the CPU; `value` stands for the one tensor among the arguments."""
        args, kwargs = tree_map_only(Tensor, lambda _: value, (self.args, self.kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self.function(*args, **kwargs)


class InitialValues(TorchDispatchMode):
    """Records the operations on tensors on ``meta`` while it is entered: nothing but their names and numbers.

    Values come from the seed and the parameter's name, so they are the same on every rank. Constants are those of a
    usual build; random values are of the same distribution but other draws, since there all share one generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._steps: dict[int, list[_Step] | None] = {}  # by storage; None is beyond what can be repeated
        self._alive: list[torch.UntypedStorage] = []  # so that no address is used twice; they hold no memory

    def __enter__(self) -> InitialValues:
        super().__enter__()
        # torch leaves tensors on meta alone in this one, without a trace
        self._truncated = nn.init._no_grad_trunc_normal_
        nn.init._no_grad_trunc_normal_ = self._skip
        return self

    def __exit__(self, *problem: Any) -> None:
        nn.init._no_grad_trunc_normal_ = self._truncated
        super().__exit__(*problem)

    def _skip(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._steps[_key(tensor)] = None
        return tensor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(out, Tensor) and out.is_meta:
            self._record(_Step(function, args, kwargs), given, out)
        return out

    def _record(self, step: _Step, given: list[Tensor], out: Tensor) -> None:
        key, sources = _key(out), {_key(t) for t in given}
        changes = step.function._schema.is_mutable
        if key in sources and not changes:  # a view
            return
        repeatable = len(sources) <= 1 and all(_is_whole(t) for t in given)
        before = self._steps.get(next(iter(sources)), None) if sources else []
        self._steps[key] = [*before, step] if repeatable and before is not None else None
        self._alive.append(out.untyped_storage())

    def knows(self, parameter: Tensor) -> bool:
        """Whether the initial value of a parameter that was built can be made."""
        return bool(self._steps.get(_key(parameter))) and _is_whole(parameter)

    def is_drawn(self, parameter: Tensor) -> bool:
        """Whether random numbers are in the initial value of one that is known; many are drawn and then set to 0."""
        make = self.maker("", parameter)
        values = [make(), InitialValues(self._seed + 1)._make("", *make.args[1:])]
        return not torch.equal(*values)

    def maker(self, name: str, parameter: Tensor) -> Callable[[], Tensor]:
        """What makes it, whole, float32 on the CPU; it does not need the parameter any more."""
        return partial(self._make, name, tuple(parameter.shape), self._steps[_key(parameter)])

    def _make(self, name: str, shape: tuple[int, ...], steps: list[_Step]) -> Tensor:
        value: Tensor | None = None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed_of(self._seed, f"initial value of {name}"))
            for step in steps:
                value = step.again(value)
        return value.reshape(shape).float()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
