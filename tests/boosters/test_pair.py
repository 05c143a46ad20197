"""Two models in turns: every backend gives the numbers of DDP, resumes bit for bit, and hands over to one process."""

from __future__ import annotations

import pytest

from tests.distributed.programs import found_by


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `pair_cases` found, with real processes."""
    pytest.importorskip("colossalai", reason="pip install -r requirements/colossalai.txt")
    return found_by("pair_cases", tmp_path_factory.mktemp("pair"))


def test_backends_and_worlds_agree(facts: dict) -> None:
    """Losses and gradient norms of both roles, whole models and adapters, on two processes and resumed in one."""
    for mode in ("whole", "lora"):
        reference = {row["step"]: row for row in facts[f"ddp {mode}"]["metrics"]}
        assert [sorted(row) for row in reference.values()][:2] == [
            ["grad_norm_generator", "loss_generator", "step", "step_seconds"],
            ["grad_norm_critic", "loss_critic", "step", "step_seconds"],
        ]
        for name, found in facts.items():
            if f" {mode}" not in name:
                continue
            for row in found["metrics"]:
                wanted = reference[row["step"]]
                assert row.keys() == wanted.keys(), name
                for key in row.keys() - {"step_seconds"}:
                    assert row[key] == pytest.approx(wanted[key], rel=2e-6), (name, row["step"], key)


def test_resumed_equals_uninterrupted_bit_for_bit(facts: dict) -> None:
    """On two processes, from a checkpoint between two updates of the critic: weights, moments, EMA of both at the end.
    In one process what two wrote, and in two what one wrote, loaded and saved again."""
    assert sum(name.endswith("back") for name in facts) >= 4 and sum(name.endswith("alone") for name in facts) >= 6
    assert {name: found["differ"] for name, found in facts.items() if found["differ"]} == {}
