"""ColossalAI's tensor and sequence parallelism against one process on the joined batch, really run on gloo."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import hybrid_cases as cases
import numpy as np
import pytest
import torch
from fsdp2_cases import Case

from opensora_like.boosters.colossalai_layout import place_in_cut
from opensora_like.boosters.strips import put
from opensora_like.boosters.tensor_parallel import TensorCut
from opensora_like.registry import BOOSTERS, build

CPU = torch.device("cpu")

# Largest differences allowed after 10 steps with clipping: losses and norms relative, weights absolute; measured on
# gloo: 2.0e-7, 4.0e-7, 1.2e-7.
FP32 = 1e-5
# against float32; bfloat16 keeps 8 bits, in weights, activations and gradients. Measured: 2.0e-3, 5.6e-3, 1.0e-3.
BF16_LOSSES, BF16_NORMS, BF16_WEIGHTS = 1e-2, 2e-2, 3e-3


@pytest.fixture(scope="module")
def facts() -> dict[int, dict[str, Any]]:
    return cases.results()[0]


def every(dtype: str) -> list[Any]:
    found = [(world, case) for world, some in cases.CASES.items() for case in some if case.problem.dtype == dtype]
    return [pytest.param(world, case, id=f"{world} {case.name}") for world, case in found]


def reference_of(case: Case, facts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One process, float32, the joined batch."""
    return facts[1][f"reference {dataclasses.replace(case.problem, dtype='fp32').name}"]


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def weight_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(("world", "case"), every("fp32"))
def test_float32_equals_one_process_on_the_joined_batch(world, case, facts):
    """Losses, gradient norms and final weights, whatever is cut; clipping is active."""
    found, reference = facts[world][case.name], reference_of(case, facts)
    assert furthest(found["losses"], reference["losses"]) < FP32
    assert furthest(found["norms"], reference["norms"]) < FP32
    assert weight_difference(found["weights"], reference["weights"]) < FP32
    assert min(reference["norms"]) > 0.3, "clipping was not active in every step"


@pytest.mark.parametrize(("world", "case"), every("bf16"))
def test_bfloat16_stays_near_float32(world, case, facts):
    """Rounding is all that differs."""
    found, reference = facts[world][case.name], reference_of(case, facts)
    assert furthest(found["losses"], reference["losses"]) < BF16_LOSSES
    assert furthest(found["norms"], reference["norms"]) < BF16_NORMS
    assert weight_difference(found["weights"], reference["weights"]) < BF16_WEIGHTS


@pytest.mark.parametrize("layout", cases.SKIPPED)
def test_a_non_finite_step_changes_nothing(layout, facts):
    """inf on one rank: every rank keeps masters and state, and goes on as if the step had not been."""
    found = facts[2][f"skips {layout}"]
    assert not math.isfinite(found["norm"])
    assert found["unchanged"] and found["forgotten"]


@pytest.mark.parametrize(
    ("world", "move"), [(world, move) for world, some in cases.LOADED.items() for move in some], ids=str
)
def test_a_checkpoint_moves_between_layouts(world, move, facts):
    """Masters, optimizer and EMA arrive bit by bit, and the next step is that of the run that wrote them."""
    origin, saved, read_as = move
    found = facts[world][f"{origin} {saved} -> {world} {read_as}"]
    dtypes = {cases.LAYOUTS[name].problem.dtype for name in (saved, read_as)}
    assert found["exact"]
    assert found["loss"] < (FP32 if dtypes == {"fp32"} else BF16_LOSSES)
    assert found["norm"] < (FP32 if dtypes == {"fp32"} else BF16_NORMS)


def test_a_model_on_meta_is_filled_through_the_views(facts):
    """What each rank writes into its own ranges arrives, after `refresh`, in the weights of all."""
    assert facts[2]["meta"]["equal"] and facts[2]["meta"]["losses"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tp 3", "booster.plugin_config.tp_size=3 needs a multiple of 3 processes, there are 2; .*[1, 2]"),
        ("tp 2 sp 2", "booster.plugin_config.tp_size=2 x booster.plugin_config.sp_size=2 needs a multiple of 4"),
        ("seq 4", "booster.plugin_config.sp_size=4 needs a multiple of 4 processes, there are 2"),
        (
            "heads tp",
            "booster.plugin_config.tp_size=2 does not divide the 3 heads of double_blocks.0.img_attn",
        ),
        ("heads sp", "booster.plugin_config.sp_size=2 does not divide the 3 heads .*'ring_attn'"),
        ("heads seq", "booster.plugin_config.sp_size=2 does not divide the 3 heads .*'ring_attn'"),
        ("no streams", "'split_gather': the plan of MMDiT does not say .*token_streams"),
        ("no plan", "Linear has no parallel_plan()"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_numbers(name, message, facts):
    """Before a step is taken, naming the key, both numbers and what would fit."""
    said = facts[2]["errors"][name]
    assert all(part in said for part in message.split(".*")), said


def test_split_gather_keeps_fewer_activations_than_tensor_parallelism(facts):
    """What lies between the cut linears is there for half of the tokens, and gathered tokens are not kept."""
    kept = facts[2]["kept"]
    assert kept["split_gather"] < 0.8 * kept["tp2"]


def test_ring_attention_takes_any_number_of_heads(facts):
    """Where all_to_all is refused."""
    assert facts[2]["errors"]["heads ring"] == ""


def test_the_terminal_stays_quiet(facts):
    """No advice about packages, renamed functions, or a walk of DDP that nobody asked for."""
    for word in ("tensornvme", "apex", "FutureWarning", "UserWarning", "find_unused_parameters"):
        assert word not in cases.results()[1]


@pytest.mark.parametrize(
    ("plugin", "config", "message"),
    [
        ("hybrid", {"pp_size": 2}, r"plugin_config\.pp_size=2: pipelines are not supported"),
        ("hybrid", {"tp_size": 0}, r"plugin_config\.tp_size=0 must be 1 or more"),
        ("hybrid", {"zero_stage": 3}, r"plugin_config\.zero_stage=3 is not one of \[0, 1, 2\]"),
        (
            "hybrid",
            {"zero_stage": 2},
            r"zero_stage=2 of plugin 'hybrid' needs dtype='bf16', got dtype='fp32'",
        ),
        ("hybrid", {"sp_size": 2}, r"plugin_config\.sp_size=2 has no effect while .*enable_sequence_parallelism"),
        ("hybrid", {"sequence_parallelism_mode": "ring_attn"}, r"mode='ring_attn' has no effect while"),
        (
            "hybrid",
            {"overlap_allgather": True},
            r"overlap_allgather=True has no effect while .*zero_stage",
        ),
        (
            "hybrid",
            {"zero_stage": 1, "find_unused_parameters": True},
            r"find_unused_parameters=True has no effect while .*zero_stage is 1",
        ),
        ("hybrid", {"tp": 2}, r"plugin_config\.tp: plugin 'hybrid' has no such option; .*tp_size"),
        (
            "hybrid",
            cases.SP | {"sequence_parallelism_mode": "ringattn"},
            r"mean \['ring_attn'\]",
        ),
        (
            "hybrid",
            {"enable_sequence_parallelism": True, "sequence_parallelism_mode": "ring"},
            r"'ring' is not supported: .*'split_gather'",
        ),
        ("zero1-seq", {"sequence_parallelism_mode": "split_gather"}, r"plugin 'zero1-seq' cuts none; use .*'hybrid'"),
        ("hybrid", cases.SPLIT_GATHER | {"tp_size": 1}, r"linears, and .*tp_size is 1; make it 2 or more"),
        ("hybrid", cases.SPLIT_GATHER | {"sp_size": 2}, r"sp_size=2 has no effect with .*'split_gather'"),
        ("zero1-seq", {"tp_size": 2}, r"plugin_config\.tp_size: plugin 'zero1-seq' has no such option"),
        ("gemini", {}, r"booster\.plugin='gemini' is not available: it runs on CUDA only"),
        ("hybrit", {}, r"booster\.plugin='hybrit' is not available; .*mean \['hybrid'\]"),
    ],
)
def test_settings_are_checked_when_the_booster_is_built(plugin, config, message):
    """Unknown, contradicting, or without effect: an error that names the key."""
    with pytest.raises(ValueError, match=message):
        build(
            {"type": "colossalai", "plugin": plugin, "plugin_config": config},
            BOOSTERS, where="booster", device=CPU, dtype="fp32", grad_clip=0.0,
        )  # fmt: skip


@pytest.mark.parametrize(("dim", "sizes"), [(0, (6,)), (0, (4, 2)), (1, (8,)), (1, (2, 6)), (1, (2, 4, 2))])
def test_parts_of_a_cut_matrix_tile_it(dim, sizes):
    """Any even ranges of what each rank has, put to their places, give the whole matrix, each element once."""
    shape = (sum(sizes), 5) if dim == 0 else (3, sum(sizes))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    for count in (1, 2, 3, 7):
        filled, seen = torch.full((whole.numel(),), -1.0), 0
        for rank in (0, 1):
            cut = TensorCut(shape, dim, sizes, rank, 2)
            here = cut.take(whole).reshape(-1)
            bounds = np.linspace(0, len(here), count + 1).astype(int).tolist()
            for first, last in itertools.pairwise(bounds):
                place = place_in_cut(cut, first, last)
                put(filled, here[first:last], place)
                seen += sum(strip.length * strip.count for strip in place.strips)
        assert torch.equal(filled.view(shape), whole) and seen == whole.numel()
