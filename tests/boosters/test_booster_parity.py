"""Boosters against one process on the joined batch, really run: two processes by torchrun, and one by plain python."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import booster_cases as cases
import pytest
import torch
from booster_cases import Case, Tiny, loss_of, optimizer_of, parts
from parity_harness import launch
from torch import Tensor

ALL = cases.PLAIN + cases.CLIPPED + cases.WITH_OPTIONS
WORLDS = (1, 2)

# Largest differences allowed after 10 steps, with what was measured on gloo.
FP32 = 1e-6  # weights 6.0e-8, norms 1.1e-7 (relative): the order of float32 sums
# bfloat16 keeps 8 bits, so a gradient is off by up to 2**-9 of its size, and where it is rounded (per rank, per
# micro-batch, per reduction) differs from a joined batch: weights 1.2e-3, norms 3.9e-3 (relative). One process that
# rounds in the same places gives the same weights: 0, or 3.0e-8 where clipping multiplies in another order.
BF16_WEIGHTS, BF16_NORMS = 3e-3, 1e-2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have: some of what is compared has to be equal bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, Any]], str]:
    """World size -> what `booster_cases` found, and all that was printed. The single process comes last: it reads
    the shards of the two."""
    folder = tmp_path_factory.mktemp("boosters")
    printed = [launch(Path(cases.__file__), str(folder), world=world) for world in (2, 1)]
    return {n: torch.load(folder / f"world{n}.pt") for n in WORLDS}, "".join(printed)


@pytest.fixture(scope="module")
def facts(ran: tuple[dict[int, dict[str, Any]], str]) -> dict[int, dict[str, Any]]:
    return ran[0]


def reference(case: Case, world_size: int, *, rounding: str) -> tuple[dict[str, Tensor], list[float]]:
    """The same run in plain torch, in this process. Returns: final float32 weights, gradient norms.

    Args:
        rounding: "none" trains in float32 on the joined batch; "autocast" and "zero" round to bfloat16 where DDP
            and where ZeRO with `world_size` ranks do.
    """
    masters = Tiny(0)
    optimizer = optimizer_of(case.optim)([p for p in masters.parameters() if p.requires_grad])
    norms = []
    for step in range(cases.STEPS):
        if rounding == "none":
            x, y = cases.data(step)
            loss_of(masters(x), y).backward()
        else:
            gradients = zero_gradients if rounding == "zero" else autocast_gradients
            gradients(masters, case, parts(step, case.accumulation, world_size))
        trained = [p for p in masters.parameters() if p.grad is not None]
        largest = case.grad_clip or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(trained, largest).item())
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in masters.named_parameters() if p.requires_grad}, norms


def zero_gradients(masters: Tiny, case: Case, batch: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Gradients of bfloat16 weights, divided by the ranks, summed over them and over micro-batches in bfloat16."""
    working = copy.deepcopy(masters).to(torch.bfloat16)
    working.table = masters.table
    total: dict[str, Tensor] = {}
    for micro in batch:
        per_rank = []
        for x, y in micro:
            working.zero_grad()
            (loss_of(working(x), y) / case.accumulation).backward()
            per_rank.append({n: p.grad / len(micro) for n, p in working.named_parameters() if p.grad is not None})
        for name, reduced in per_rank[0].items():
            for other in per_rank[1:]:
                reduced = reduced + other[name]
            total[name] = total[name] + reduced if name in total else reduced
    for name, parameter in masters.named_parameters():
        if name in total:
            parameter.grad = total[name].float()


def autocast_gradients(masters: Tiny, case: Case, batch: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Float32 gradients of a bfloat16 forward, one per rank and micro-batch."""
    for micro in batch:
        for x, y in micro:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = masters(x)
            (loss_of(prediction, y) / case.accumulation / len(micro)).backward()


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def norm_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", [c for c in ALL if c.dtype == "fp32"], ids=lambda c: c.name)
def test_float32_equals_one_process_on_the_joined_batch(case, world_size, facts):
    """Ten steps end at the same weights with the same gradient norms, whatever the booster and its options."""
    found = facts[world_size][f"trains {case.name}"]
    weights, norms = reference(case, world_size, rounding="none")
    assert difference(found["masters"], weights) < FP32
    assert norm_difference(found["norms"], norms) < FP32
    assert not case.grad_clip or min(norms) > case.grad_clip, "clipping was never active"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", [c for c in ALL if c.dtype == "bf16"], ids=lambda c: c.name)
def test_bfloat16_rounds_where_it_says_and_nowhere_else(case, world_size, facts):
    """Equal to one process that rounds in the same places; near to float32 on the joined batch."""
    found = facts[world_size][f"trains {case.name}"]
    weights, norms = reference(case, world_size, rounding="autocast" if case.booster == "ddp" else "zero")
    assert difference(found["masters"], weights) < (FP32 if case.grad_clip else 1e-9)
    assert norm_difference(found["norms"], norms) < FP32
    weights, norms = reference(case, world_size, rounding="none")
    assert difference(found["masters"], weights) < BF16_WEIGHTS
    assert norm_difference(found["norms"], norms) < BF16_NORMS


@pytest.mark.parametrize("case", [c for c in cases.PLAIN if c.booster == "zero1"], ids=lambda c: c.name)
def test_stages_agree_bit_for_bit(case, facts):
    """zero1 and zero2 round in the same order, with accumulation too."""
    one, two = (facts[2][f"trains {dataclasses.replace(case, booster=b).name}"] for b in ("zero1", "zero2"))
    assert difference(one["masters"], two["masters"]) == 0
    assert norm_difference(one["norms"], two["norms"]) < 1e-12  # float64 sums, over gradients in another order


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_preparing_and_training_leaves_the_rest_alone(case, world_size, facts):
    """Masters start as the exact float32 weights; frozen weights and tables stay; ranks hold the same weights."""
    found = facts[world_size][f"trains {case.name}"]
    initial = {n: p.detach() for n, p in Tiny(0).named_parameters() if p.requires_grad}
    assert difference(found["start"], initial) == 0
    assert found["ranks_agree"] and found["frozen_kept"] and found["table_kept"]
    assert torch.equal(found["masters"]["unused"], initial["unused"])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("booster", cases.NAMES)
def test_a_non_finite_step_changes_nothing(booster, dtype, world_size, facts):
    """inf on one rank: all ranks get a norm that is not finite, keep every bit, and go on as if it had not been."""
    found = facts[world_size][f"skips {booster} {dtype}"]
    assert not math.isfinite(found["norm"])
    assert found["unchanged"] and found["forgotten"]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", cases.RESUMED, ids=lambda c: c.name)
def test_resumed_equals_uninterrupted_bit_for_bit(case, world_size, facts):
    """Weights, optimizer state, working weights and norms, through files of ranges, masters and optimizer shards."""
    found = facts[world_size][f"resumes {case.name}"]
    assert found["restored"] and found["equal"] and found["norms_equal"]


@pytest.mark.parametrize("case", cases.RESUMED, ids=lambda c: c.name)
def test_one_process_continues_what_two_wrote(case, facts):
    """Masters and optimizer state come over exactly; the continued run differs by rounding only."""
    wrote, read = facts[2][f"resumes {case.name}"], facts[1][f"reads {case.name}"]
    assert difference(wrote["masters"], read["masters"]) == 0
    assert wrote["state"].keys() == read["state"].keys() != set()
    for kind, tensors in wrote["state"].items():
        assert difference(tensors, read["state"][kind]) == 0, kind
    assert difference(wrote["final"], read["final"]) < (FP32 if case.dtype == "fp32" else BF16_WEIGHTS)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("booster", cases.NAMES)
def test_a_model_on_meta_is_filled_through_the_views(booster, world_size, facts):
    """What each rank writes into its own ranges arrives, after `refresh`, in the weights of all."""
    found = facts[world_size][f"meta {booster}"]
    assert found["filled"] and found["finite"]


def test_ddp_averages_a_parameter_that_one_rank_leaves_out(facts):
    """With find_unused_parameters the missing gradient counts as zero."""
    model = Tiny(0)
    optimizer = optimizer_of("sgd")([p for p in model.parameters() if p.requires_grad])
    for step in range(cases.STEPS):
        for rank, (x, y) in enumerate(parts(step, 1, 2)[0]):
            (loss_of(model(x, large=rank == 0), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert difference(facts[2]["partly"]["masters"], expected) < FP32


def test_the_terminal_stays_quiet(ran):
    """ColossalAI's advice about packages that are not needed, and torch's about renamed functions, do not appear."""
    for word in ("tensornvme", "apex", "FutureWarning", "UserWarning"):
        assert word not in ran[1]
