"""Samples per update stay what was asked for on any number of processes; sizes that do not divide say which would."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opensora_like.config import read_config
from opensora_like.training.batch_size import accumulation_of, with_batch_sizes
from tests.training.harness import CONFIG, build_toy, metrics_of, torchrun, train_toy

TOY = read_config(CONFIG).config
ONE_BUCKET = ["--bucket-config", "{'8px_ar1:1': {5: (1.0, 2)}}"]


def resolved(world_size: int, **changed: Any) -> Any:
    return with_batch_sizes(dataclasses.replace(TOY, **changed), world_size)


def test_accumulation_follows_from_the_sizes() -> None:
    """Ranks that share a sample count once; the local size goes into every bucket."""
    found = resolved(4, global_batch_size=24, local_batch_size=3)
    assert found.accumulation_steps == 2
    assert {n: e[1] for n, e in found.bucket_config["8px_ar1:1"].items()} == {1: 3, 5: 3, 9: 3}
    assert [e[0] for e in found.bucket_config["8px_ar1:1"].values()] == [1.0, 1.0, 0.5], "shares stay"
    for booster in (
        {"type": "fsdp2", "tp_size": 2, "sp_size": 2},
        {"type": "colossalai", "plugin": "hybrid", "plugin_config": {"tp_size": 4}},
    ):
        assert resolved(8, global_batch_size=12, local_batch_size=3, booster=booster).accumulation_steps == 2
    assert resolved(4) is not None and resolved(4).accumulation_steps == 1


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        # the published two-node config: 8 samples on 16 ranks
        (
            (8, 1, 16),
            ["global_batch_size=8", "batches of 1 on 16", "global_batch_size 16", "ranks out of [1, 2, 4, 8]"],
        ),
        ((12, 8, 1), ["global_batch_size 8 or 16", "local_batch_size one of [1, 2, 3, 4, 6, 12]"]),
        ((0, 2, 2), ["global_batch_size=0", "use global_batch_size 4"]),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes: tuple[int, int, int], parts: list[str]) -> None:
    """Both numbers, and the sizes that would."""
    with pytest.raises(ValueError) as caught:
        accumulation_of(*sizes)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch_size": 4, "accumulation_steps": 2}, "remove one"),
        (
            {"global_batch_size": 4, "bucket_config": {"8px_ar1:1": {1: (1.0, 0)}}},
            "bucket_config has batches of 0",
        ),
        ({"global_batch_size": 4}, r"batches of \[2, 3\]; set local_batch_size"),
        ({"local_batch_size": 0}, "local_batch_size=0"),
        (
            {"global_batch_size": 4, "local_batch_size": 1, "booster": {"type": "fsdp2", "tp_size": 4}},
            "shares a sample",
        ),
    ],
)
def test_settings_that_contradict_are_refused(changed: dict[str, Any], message: str) -> None:
    """Before anything is built."""
    with pytest.raises(ValueError, match=message):
        resolved(2, **changed)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """With global_batch_size the losses of one and two processes agree, and a run goes on with the other number."""
    arguments = [*ONE_BUCKET, "--global-batch-size", "4", "--log-every", "1"]
    one = train_toy(tmp_path / "one", *arguments, "--steps", "4")
    assert one.schedule.accumulation_steps == 2
    assert read_config(tmp_path / "one/toy/config.py").config.accumulation_steps == 1, "the file is for any number"
    two = tmp_path / "two"
    begun = torchrun(2, "--outputs", str(two), *arguments, "--steps", "2")
    assert begun.returncode == 0, begun.output
    train_toy(two, *arguments, "--steps", "4", "--load", "latest")
    alone = [row[0] for row in metrics_of(tmp_path / "one/toy", "loss")]
    assert alone == pytest.approx([row[0] for row in metrics_of(two / "toy", "loss")], abs=1e-5)
    assert one.state.samples == 16


def test_a_run_says_what_would_divide(tmp_path: Path) -> None:
    """The door's error, from the command line on."""
    with pytest.raises(ValueError, match="global_batch_size 2 or 4"):
        build_toy(tmp_path, *ONE_BUCKET, "--global-batch-size", "3")
