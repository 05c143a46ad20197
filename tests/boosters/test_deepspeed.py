"""DeepSpeed against one process on the joined batch, really run in one and two processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="pip install -r requirements/deepspeed.txt")

import booster_cases as base
import deepspeed_cases as cases
from booster_cases import Case, Tiny, loss_of, optimizer_of, parts
from parity_harness import launch

WORLDS = (1, 2)
TRAINED = {**cases.PLAIN, **cases.WITH_OPTIONS}

# Largest differences allowed, with what was measured on gloo: the order of float32 sums.
FP32 = 1e-6  # weights 6e-8, losses 2e-7, norms 3e-7 (the last two relative)
# bfloat16 keeps 8 bits: an activation, a gradient and a sum of them are each off by up to 2**-9 of their size.
# After 10 steps: weights 5.9e-4 (AdamW at lr 3e-3, stage 3), losses 1.3e-3, norms 3.7e-3 (relative).
BF16_WEIGHTS, BF16_LOSSES, BF16_NORMS = 2e-3, 4e-3, 1e-2


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, Any]], str]:
    """World size -> what `deepspeed_cases` found, and all that was printed. The single process comes last: it reads
    the checkpoints of the two."""
    folder = tmp_path_factory.mktemp("deepspeed")
    # there is no compiler, as on many clusters
    printed = [launch(Path(cases.__file__), str(folder), world=world, CXX="/no/compiler") for world in (2, 1)]
    return {n: torch.load(folder / f"deepspeed_world{n}.pt") for n in WORLDS}, "".join(printed)


@pytest.fixture(scope="module")
def facts(ran: tuple[dict[int, dict[str, Any]], str]) -> dict[int, dict[str, Any]]:
    return ran[0]


# A reference: float32 masters, and what computes their gradients of one step and returns the loss.
Gradients = Callable[[nn.Module, int], float]


def reference(
    case: Case, gradients: Gradients, *, steps: int = base.STEPS, model: Callable[[], nn.Module] = lambda: Tiny(0)
) -> dict[str, Any]:
    """The same run in plain torch, in this process; like DeepSpeed, it takes a missing gradient for zero."""
    masters = model()
    trained = [p for p in masters.parameters() if p.requires_grad]
    optimizer = optimizer_of(case.optim)(trained)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(gradients(masters, step))
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms.append(nn.utils.clip_grad_norm_(trained, case.grad_clip or math.inf).item())
        optimizer.step()
    weights = {n: p.detach() for n, p in masters.named_parameters() if p.requires_grad}
    return {"masters": weights, "losses": losses, "norms": norms}


def joined(masters: nn.Module, step: int) -> float:
    """Float32 gradients of the whole batch at once."""
    x, y = base.data(step)
    loss = loss_of(masters(x), y)
    loss.backward()
    return loss.item()


def rounded(case: Case, world_size: int) -> Gradients:
    """Gradients with bfloat16 weights, rounded where DeepSpeed rounds.

    Stage 1 adds a rank's micro-batches and then the ranks; the others add ranks first.
    """

    def gradients(masters: nn.Module, step: int) -> float:
        working = copy.deepcopy(masters).to(torch.bfloat16)
        working.table = masters.table
        of = [
            [_gradients(working, x, y, case) for x, y in micro] for micro in parts(step, case.accumulation, world_size)
        ]
        if case.booster == "zero1":
            of = [[_sum([micro[rank] for micro in of]) for rank in range(world_size)]]
        total = _sum([_sum([{n: g / world_size for n, g in rank.items()} for rank in micro]) for micro in of])
        for name, parameter in masters.named_parameters():
            if name in total:
                parameter.grad = total[name].float()
        return math.nan

    return gradients


def _gradients(model: nn.Module, x: Tensor, y: Tensor, case: Case) -> dict[str, Tensor]:
    model.zero_grad()
    (loss_of(model(x), y) / case.accumulation).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _sum(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total = gradients[0]
    for more in gradients[1:]:
        total = {n: g + more[n] for n, g in total.items()}
    return total


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


def of_dtype(dtype: str) -> list[str]:
    return [name for name, case in TRAINED.items() if case.dtype == dtype]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", of_dtype("fp32"))
def test_float32_equals_one_process_on_the_joined_batch(name, world_size, facts):
    """Ten steps: the same losses, gradient norms and weights, whatever the stage and its options, clipped or not."""
    found, expected = facts[world_size][f"trains {name}"], reference(TRAINED[name], joined)
    assert difference(found["masters"], expected["masters"]) < FP32
    assert relative(found["losses"], expected["losses"]) < FP32
    assert relative(found["norms"], expected["norms"]) < FP32
    assert min(expected["norms"]) > TRAINED[name].grad_clip, "clipping was not active in every step"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", of_dtype("bf16"))
def test_bfloat16_stays_near_float32(name, world_size, facts):
    """The same runs with bfloat16 weights and gradients, float32 masters: off by rounding alone."""
    found, expected = facts[world_size][f"trains {name}"], reference(TRAINED[name], joined)
    assert difference(found["masters"], expected["masters"]) < BF16_WEIGHTS
    assert relative(found["losses"], expected["losses"]) < BF16_LOSSES
    assert relative(found["norms"], expected["norms"]) < BF16_NORMS


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", [name for name, case in cases.PLAIN.items() if case.dtype == "bf16"])
def test_bfloat16_rounds_where_it_says_and_nowhere_else(name, world_size, facts, monkeypatch):
    """Equal to one process that rounds in the same places; stage 3 rounds before it adds a bias as well."""
    case = cases.PLAIN[name]
    if case.booster == "zero3":
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: x @ w.t() if b is None else x @ w.t() + b)
    found, expected = facts[world_size][f"trains {name}"], reference(case, rounded(case, world_size))
    assert difference(found["masters"], expected["masters"]) < FP32
    assert relative(found["norms"], expected["norms"]) < FP32


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", TRAINED)
def test_preparing_and_training_leaves_the_rest_alone(name, world_size, facts):
    """Masters start as the exact float32 weights; frozen weights and tables stay; ranks hold the rounded masters."""
    found = facts[world_size][f"trains {name}"]
    initial = {n: p.detach() for n, p in Tiny(0).named_parameters() if p.requires_grad}
    assert difference(found["start"], initial) == 0
    assert found["working_are_masters"] and found["ranks_agree"] and found["frozen_kept"] and found["table_kept"]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "offloaded"])
@pytest.mark.parametrize("stage", cases.STAGES)
def test_a_non_finite_step_changes_nothing(stage, kind, world_size, facts):
    """inf on one rank: all ranks get inf for the norm, keep every bit, and go on as if it had not been."""
    found = facts[world_size][f"skips {stage} {kind}"]
    assert found == {"norm": math.inf, "unchanged": True, "forgotten": True}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("use", cases.USES)
@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("stage", cases.STAGES)
def test_a_weight_that_a_micro_batch_leaves_out(stage, where, use, world_size, facts):
    """Its gradient is that of the micro-batches that use it, neither lost nor left over from another step."""
    case = Case(stage, "fp32", "sgd", 2, grad_clip=cases.CLIP if where == "host" else 0.0)

    def some(masters: nn.Module, step: int) -> float:
        for i, micro in enumerate(parts(step, case.accumulation, 1)):
            x, y = micro[0]
            (loss_of(masters(x, large=cases.USES[use](step, i)), y) / case.accumulation).backward()
        return math.nan

    found = facts[world_size][f"leaves out {stage} {where} {use}"]
    expected = reference(case, some, steps=cases.FEW)
    assert difference(found["masters"], expected["masters"]) < FP32
    assert relative(found["norms"], expected["norms"]) < FP32


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_forwards_need_not_alternate_with_backwards(stage, world_size, facts):
    """Two forwards before a backward, recomputed blocks, and forwards without gradients between steps."""

    def twice(masters: nn.Module, step: int) -> float:
        x, y = base.data(step)
        loss_of(masters(x) - masters(-x), y).backward()
        return math.nan

    expected = reference(Case(stage), twice, steps=cases.FEW, model=cases.Twice)
    found = facts[world_size][f"many forwards {stage}"]
    weights = {n.removeprefix("tiny."): t for n, t in expected["masters"].items()}
    assert difference(found["masters"], weights) < FP32
    assert relative(found["norms"], expected["norms"]) < FP32


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", cases.RESUMED, ids=lambda c: f"{c.booster} {c.dtype}")
def test_resumed_equals_uninterrupted_bit_for_bit(case, world_size, facts):
    """Weights, optimizer state, working weights and norms, through a checkpoint; the EMA gathers as masters do."""
    found = facts[world_size][f"resumes {case.booster} {case.dtype}"]
    assert found["restored"] and found["equal"] and found["norms_equal"]
    assert difference(found["ema"], found["masters"]) == 0


@pytest.mark.parametrize("case", cases.RESUMED, ids=lambda c: f"{c.booster} {c.dtype}")
def test_one_process_continues_what_two_wrote(case, facts):
    """Masters and optimizer state come over exactly; the continued run differs by rounding only."""
    key = f"{case.booster} {case.dtype}"
    wrote, read = facts[2][f"resumes {key}"], facts[1][f"reads {key}"]
    assert difference(wrote["masters"], read["masters"]) == 0
    assert wrote["state"].keys() == read["state"].keys() != set()
    for kind, tensors in wrote["state"].items():
        assert difference(tensors, read["state"][kind]) == 0, kind
    assert difference(wrote["final"], read["final"]) < (FP32 if case.dtype == "fp32" else BF16_WEIGHTS)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_checkpoint_of_another_booster(world_size, facts):
    """ddp's masters and moments come over exactly; of its counters, one per parameter, the largest counts."""
    found = facts[world_size]["reads ddp"]
    assert difference(*found["masters"]) == 0
    theirs, ours = found["state"]
    assert theirs.keys() == ours.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert difference(theirs["exp_avg"], ours["exp_avg"]) == difference(theirs["exp_avg_sq"], ours["exp_avg_sq"]) == 0
    assert theirs["step"]["unused"] == 0 and {count.item() for count in ours["step"].values()} == {3.0}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_a_model_on_meta_is_filled_through_the_views(stage, world_size, facts):
    """What each rank writes into its own ranges arrives, after `refresh`, in the weights of all."""
    assert facts[world_size][f"meta {stage}"] == {"filled": True, "finite": True}


def test_the_terminal_stays_quiet(ran):
    """Of all that DeepSpeed says, the skipped steps remain; it compiles nothing."""
    warnings = [line for line in ran[1].splitlines() if "WARNING" in line]
    assert warnings and all("Skipping step" in line for line in warnings)
    for word in ("FutureWarning", "UserWarning", "Error", "built successfully", "INFO"):
        assert word not in ran[1]
