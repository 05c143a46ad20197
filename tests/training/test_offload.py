"""Activations kept in host memory: the same loss and gradients, bit for bit; room that comes back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_like.models.mmdit import MMDiT
from opensora_like.training.offload import ActivationOffload, build_offload
from tests.models.test_mmdit import inputs, tiny
from tests.training.harness import assert_same, metrics_of, train_toy

CPU = torch.device("cpu")
PLENTY = 1 << 26


def gradients(model: MMDiT, offload: ActivationOffload) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes in the buffer between forward and backward."""
    model.zero_grad()
    x, t, conditions = inputs(model)
    with offload():
        loss = model(x, t, conditions).square().mean()
    used = offload.used_bytes
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, used


@pytest.mark.parametrize("settings", [None, (1, 1), True])
@pytest.mark.parametrize("size", [20_000, PLENTY])
def test_gradients_are_the_same_bits(settings, size: int) -> None:
    """With and without recomputation, with room for all and for some; twice, since the buffer is used again."""
    model = tiny(guidance_embed=True, cond_embed=True)
    x, t, conditions = inputs(model)
    plain = model(x, t, conditions).square().mean()
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.set_grad_checkpoint(settings)
    offload = ActivationOffload(size, CPU, min_size=0)
    for _ in range(2):
        loss, found, used = gradients(model, offload)
        assert torch.equal(loss, plain)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert 0 < used <= size and (offload.kept_bytes > 0) == (size < PLENTY)
        assert offload.used_bytes == 0


def test_parameters_stay_and_a_storage_is_copied_once() -> None:
    """A linear's weight is not copied; views of one storage are one copy; an old address is no old tensor."""
    linear = torch.nn.Linear(64, 64, bias=False)
    offload = ActivationOffload(PLENTY, CPU, min_size=0)
    x = torch.randn(8, 64, requires_grad=True)
    with offload():
        y = linear(x)  # saves x and the weight
        z = (y * y[:, :1]).sum() + (y.view(-1) * y.reshape(-1)).sum()  # saves y, as four tensors
    assert offload.copied_bytes == x.nbytes + y.nbytes
    z.backward()
    assert offload.used_bytes == 0

    value = torch.randn(64, 64, requires_grad=True)
    with offload():
        for _ in range(20):  # storages come and go, so that addresses repeat
            value = (value * 1.01).sin()
        total = value.sum()
    total.backward()


def test_a_graph_that_is_dropped_gives_its_room_back() -> None:
    """Without a backward, as when a step fails."""
    offload = ActivationOffload(PLENTY, CPU, min_size=0)
    with offload():
        loss = torch.randn(1000, requires_grad=True).sin().exp().sum()
    assert offload.used_bytes > 0
    del loss
    assert offload.used_bytes == 0


@pytest.mark.parametrize("booster", ["ddp", "fsdp2"])
def test_a_run_trains_the_same_bits(booster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through config, step and booster, with accumulation."""
    monkeypatch.setattr("opensora_like.training.offload.MIN_SIZE", 0)
    common = (
        f"--booster={{'type': '{booster}'}}",
        "--steps",
        "3",
        "--accumulation-steps",
        "2",
        "--model.grad-ckpt-settings",
        "True",
    )
    plain = train_toy(tmp_path / "plain", *common)
    offloaded = train_toy(tmp_path / "offloaded", *common, "--grad-ckpt-buffer-size", str(PLENTY))
    assert offloaded.step_fn._around_forward.copied_bytes > 0
    assert_same(offloaded, plain)
    assert metrics_of(tmp_path / "offloaded" / "toy") == metrics_of(tmp_path / "plain" / "toy")


def test_a_negative_size_is_an_error() -> None:
    """And 0 is off."""
    with pytest.raises(ValueError, match="grad_ckpt_buffer_size=-1"):
        build_offload(-1, CPU)
    assert build_offload(0, CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [None, True])
def test_on_a_gpu_gradients_are_the_same_bits_and_memory_falls(settings) -> None:
    """Copies on a stream of their own, with a model and a sample large enough for them to overlap."""
    device = torch.device("cuda", 0)
    big = {"hidden_size": 512, "num_heads": 8, "depth": 4, "depth_single_blocks": 8, "axes_dim": (16, 24, 24)}
    model = tiny(**big).to(device)
    model.set_grad_checkpoint(settings)
    x, t, conditions = inputs(model, frames=8, height=32, width=64)
    x, t, conditions = x.to(device), t.to(device), {k: v.to(device) for k, v in conditions.items()}
    offload = ActivationOffload(8 << 30, device)

    def run(around) -> tuple[Tensor, dict[str, Tensor], int]:
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        with around():
            loss = model(x, t, conditions).square().mean()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, held

    torch.use_deterministic_algorithms(True, warn_only=True)
    expected_loss, expected, held = run(nullcontext)
    for _ in range(3):
        loss, found, held_offloaded = run(offload)
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert offload.used_bytes == 0 and offload.copied_bytes > 0
        assert held_offloaded < held / 2, (held_offloaded, held)
