"""What boosters share around an update: the gradient norm, and the state of the optimizer as ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def check_numbers(*, dtype: str, grad_clip: float, dtypes: tuple[str, ...]) -> None:
    """Check what every booster is told by the program.

    Raises:
        ValueError: a dtype that is not in `dtypes`, or a negative `grad_clip`.
    """
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r} is not supported by this booster; use one of {list(dtypes)}")
    if grad_clip < 0:
        raise ValueError(f"grad_clip={grad_clip} is negative; use 0 for no clipping")


def sum_of_squares(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of all elements. Returns: float64 scalar on `device`, so that no large finite gradient overflows in it."""
    gradients = list(gradients)
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # on a GPU some kernels for all, not one for each
    return torch.stack(norms).double().square().sum()


class OptimizerState:
    """The state of an Adam or SGD, by parameter name, made before the first step if need be.

    Args:
        owners: parameter name -> the tensor that the optimizer updates.
        own: (parameter name, a tensor shaped like its owner) -> the flat part of it that this rank owns, a view.

    Raises:
        ValueError: an optimizer whose state is not known here.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        owners: Mapping[str, Tensor],
        own: Callable[[str, Tensor], Tensor],
    ) -> None:
        self._optimizer, self._owners, self._own = optimizer, owners, own
        self._counters: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            _check_group(group, type(optimizer).__name__)

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """State name -> parameter name -> live view of this rank's part; counters without dimension."""
        self._make()
        found: dict[str, dict[str, Tensor]] = {}
        for name, owner in self._owners.items():
            for kind, value in self._optimizer.state[owner].items():
                if isinstance(value, int):
                    # HybridAdam counts in python; what was handed out is read back in `read_counters`
                    value = self._counters[name] = torch.tensor(float(value))
                elif not isinstance(value, Tensor):
                    continue
                found.setdefault(kind, {})[name] = self._own(name, value) if value.ndim else value
        return found

    def whole(self) -> Iterable[tuple[str, Tensor]]:
        """(parameter name, state tensor shaped like its owner), of what there is."""
        for name, owner in self._owners.items():
            for value in self._optimizer.state[owner].values():
                if isinstance(value, Tensor) and value.ndim:
                    yield name, value

    def read_counters(self) -> None:
        """Take over the counters that were handed out as tensors, after a load wrote into them."""
        for name, counter in self._counters.items():
            self._optimizer.state[self._owners[name]]["step"] = int(counter)
        self._counters.clear()

    def _make(self) -> None:
        """Zeros where the optimizer has not put a state yet: its first step then does what it would have done."""
        for group in self._optimizer.param_groups:
            for owner in group["params"]:
                state = self._optimizer.state[owner]
                if "betas" in group and not state:
                    state["step"] = self._first_count(owner, group)
                    state["exp_avg"] = torch.zeros_like(owner)
                    state["exp_avg_sq"] = torch.zeros_like(owner)
                elif group.get("momentum") and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(owner)

    def _first_count(self, owner: Tensor, group: dict) -> Tensor | int:
        if not isinstance(self._optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            return 0
        on_device = group["capturable"] or group["fused"]
        return torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")


def _check_group(group: dict, kind: str) -> None:
    if "betas" not in group and "momentum" not in group:
        raise ValueError(f"optim.type={kind!r}: its state cannot be saved; use AdamW, HybridAdam or SGD")
    for option in ("amsgrad", "dampening"):
        if group.get(option):
            raise ValueError(f"optim.{option}={group[option]!r} is not supported; leave it out")
