"""What a step makes the host wait for on a GPU: counted on the CPU, by the calls that would wait there."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_like import boosters, conditioning
from opensora_like.boosters.ddp import DDPBooster
from opensora_like.boosters.update import sum_of_squares
from opensora_like.training.ema import EMA
from opensora_like.training.trainer import train
from tests.training import harness

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero", "masked_select"}
PACKAGE = str(Path(boosters.__file__).parent.parent)
ON_THE_CPU = {f"{Path(conditioning.__file__).parent}/masks.py:draw_tasks"}  # of numbers that are drawn there


class Waits(TorchFunctionMode):
    """Collects where the package's own code reads tensors on the host, and copies or indexes so that the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.is_on = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_on and (kind := _kind_of_wait(getattr(func, "__name__", ""), args, kwargs)):
            caller = traceback.extract_stack(limit=2)[0]  # of libraries the calls are their own affair
            if caller.filename.startswith(PACKAGE):
                self.found.add((kind, f"{caller.filename}:{caller.name}"))
        return func(*args, **kwargs)


def _kind_of_wait(name: str, args: tuple, kwargs: dict) -> str | None:
    if name in READS:
        return name
    if name == "to" and not kwargs.get("non_blocking"):
        moves = "device" in kwargs or any(isinstance(a, (torch.device, torch.Tensor, str)) for a in args[1:])
        return "to" if moves else None
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        is_list = any(isinstance(i, list) for i in index)
        return "index" if is_list or any(getattr(i, "dtype", None) == torch.bool for i in index) else None
    return None


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ("toy_config.py", set()),
        # umT5's embeddings are checked when a caption is first seen
        ("toy_wan_config.py", {("tolist", "models/text_encoders.py:_run")}),
        # lengths of text decide shapes; images are prepared on 8 bits by transformers
        (
            "toy_hunyuan_i2v.py",
            {
                ("tolist", "models/hunyuan_video/model.py:_text"),
                ("to", "models/image_encoders.py:prepared"),
                ("nonzero", "models/llm_text_encoder.py:_with_image"),  # of ids on the CPU, as the next
                ("__int__", "models/llm_text_encoder.py:_with_image"),
            },
        ),
    ],
)
def test_a_step_waits_for_the_gradient_norm_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, known: set[tuple[str, str]]
) -> None:
    """From captions and pixels to the update; what a model adds is named here with its reason."""
    monkeypatch.setattr(harness, "CONFIG", harness.ROOT / "tests/training" / config)
    run = harness.build_toy(tmp_path, "--steps", "5", "--log-every", "100", "--ema-decay", "0.9")
    waits, before_step = Waits(), run.before_step

    def begin(step: int) -> str:
        waits.is_on = 0 < step < 4  # the last step saves
        return before_step(step)

    run.before_step = begin
    with waits:
        train(run)
    found = {(kind, place) for kind, place in waits.found if place not in ON_THE_CPU}
    assert found == {(k, f"{PACKAGE}/{place}") for k, place in known | {("item", "boosters/ddp.py:step")}}


class Calls(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_norm_of_many_gradients_is_few_operations() -> None:
    """And the same number as one by one."""
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in range(1, 200)]
    with Calls() as calls:
        squares = sum_of_squares(gradients, torch.device("cpu"))
    assert len(calls.names) < 10
    assert torch.equal(squares, torch.stack([g.norm() for g in gradients]).double().square().sum())


def test_the_average_of_many_weights_is_one_operation() -> None:
    """And the same weights as one by one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(20)))
    booster = DDPBooster(device=torch.device("cpu"), dtype="fp32", grad_clip=0.0)
    booster.prepare(model, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    ema, before = EMA(booster, 0.99), dict(model.named_parameters())
    before = {name: p.detach().clone().view(-1) for name, p in before.items()}
    for _, master in booster.master_shards():
        master.add_(torch.randn_like(master))
    with Calls() as calls:
        ema.update(10_000)
    assert [name for name in calls.names if "lerp" in name] == ["aten::_foreach_lerp_.Scalar"]
    for name, master in booster.master_shards():
        assert torch.equal(ema.shards[name], before[name].lerp(master, 1 - 0.99))
