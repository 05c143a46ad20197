"""Checkpoints move: from two processes to one and to four, and from any backend to any other."""

from __future__ import annotations

import pytest

from tests.distributed.programs import found_by


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `elastic_cases` found, with real processes."""
    pytest.importorskip("colossalai", reason="pip install -r requirements/colossalai.txt")
    return found_by("elastic_cases", tmp_path_factory.mktemp("elastic"))


def readers(facts: dict) -> dict[str, dict]:
    return facts["world 1"] | facts["world 4"]


def test_every_number_survives_the_move(facts: dict) -> None:
    """Weights, moments, counters and EMA: loaded by another backend on another number of ranks and saved again, all
    tensors of the checkpoint are the same in every bit."""
    moves = {name: found for name, found in readers(facts).items() if "->" in name}
    assert len(moves) == 2 * len(facts["writer"]) ** 2
    assert all(found["num"] > 200 for found in moves.values())
    assert {name: found["differ"] for name, found in moves.items() if found["differ"]} == {}


def test_the_data_go_on_where_they_stood(facts: dict) -> None:
    """The micro-batches after the checkpoint are those of the run that was not moved, each with the same rows."""
    whole = facts["writer"]["ddp"]["rows"]
    for name, found in readers(facts).items():
        if "->" not in name:
            assert len(found["rows"]) == len(whole) // 2, name
            assert all(whole[key] == rows for key, rows in found["rows"].items()), name


def test_training_goes_on_with_the_same_numbers(facts: dict) -> None:
    """Steps, samples, losses and gradient norms, up to the order of float32 sums (measured: 2e-7, relative)."""
    whole = facts["writer"]["ddp"]["metrics"]
    for name, found in (facts["writer"] | readers(facts)).items():
        if "->" not in name:
            assert [row[:2] for row in found["metrics"]] == [row[:2] for row in whole], name
            for mine, theirs in zip(found["metrics"], whole, strict=True):
                assert mine == pytest.approx(theirs, rel=2e-6), name
