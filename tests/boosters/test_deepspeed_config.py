"""What the DeepSpeed booster refuses, and its parts that need no second process."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="pip install -r requirements/deepspeed.txt")

from opensora_like import runtime
from opensora_like.boosters.deepspeed_config import Decided, complete_config, read_config
from opensora_like.boosters.deepspeed_flat import cut
from opensora_like.registry import BOOSTERS, build

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one, as a script has it that no launcher started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("LOCAL_SIZE", "1")
        runtime.start()
        yield
        runtime.finish()


def built(dtype: str = "fp32", grad_clip: float = 0.05, accumulation_steps: int | None = 2, **section: Any) -> Any:
    return build(
        {"type": "deepspeed", **section},
        BOOSTERS,
        where="booster",
        device=CPU,
        dtype=dtype,
        grad_clip=grad_clip,
        accumulation_steps=accumulation_steps,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            r"booster\.config\.gradient_clipping=1\.0 contradicts grad_clip=0\.05; write 'auto'",
        ),
        (
            {"gradient_accumulation_steps": 4},
            r"\.gradient_accumulation_steps=4 contradicts accumulation_steps=2; write 'auto'",
        ),
        ({"train_micro_batch_size_per_gpu": 1}, r"\.train_micro_batch_size_per_gpu=1: bucket_config decides"),
        ({"train_batch_size": 8}, r"\.train_batch_size=8: bucket_config decides"),
        ({"bf16": {"enabled": True}}, r"\.bf16\.enabled=True contradicts dtype='fp32'"),
        ({"fp16": {"enabled": True}}, r"\.fp16\.enabled=True contradicts dtype='fp32'"),
        ({"bf16": {"check_grad_overflow": False}}, r"\.bf16\.check_grad_overflow=False is not supported .* write True"),
        ({"bf16": True}, r"booster\.config\.bf16=True must be an object"),
        ({"gradient_cliping": 1.0}, r"\.gradient_cliping: not an option .*\['gradient_clipping'"),
        ({"scheduler": {"type": "WarmupLR"}}, r"\.scheduler: .* use lr_schedule and warmup_steps"),
        ({"zero_optimization": {"stage": 3}}, r"\.zero_optimization\.stage=3 contradicts booster\.stage=2"),
        ({"zero_optimization": {"overlap_com": True}}, r"\.zero_optimization\.overlap_com: .*\['overlap_comm'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"booster\.config: deepspeed refuses it: .*reduce_bucket"),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"\.compute_grad_norm=False is not supported"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"offload_optimizer\.device='nvme'"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"device='cpu' contradicts booster\.cpu_offload=False",
        ),
        ({"data_types": {"gradient_dtype": "fp32"}}, r"\.data_types\.gradient_dtype: .*grad_accum_dtype"),
    ],
)
def test_a_config_that_contradicts_the_program_is_refused(config, message, group):
    """The error names the key, both values and what to do."""
    with pytest.raises(ValueError, match=message):
        built(stage=2, cpu_offload=False, config=config)


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"zero_optimization": {"overlap_comm": True}}, "fp32", r"overlap_comm=True needs stage 2 or 3"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "bf16", r"grad_accum_dtype='fp32' .* use stage 2"),
    ],
)
def test_what_stage_1_cannot_do(config, dtype, message, group):
    """One would be an assertion of DeepSpeed's in the middle of the set-up, the other another optimizer."""
    with pytest.raises(ValueError, match=message):
        built(stage=1, dtype=dtype, config=config)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_are_whole_are_kept_nowhere_else(stage, group):
    """DeepSpeed takes the setting and leaves the weights where they are."""
    config = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    with pytest.raises(ValueError, match=rf"offload_param\.device='cpu' has no effect at stage {stage}"):
        built(stage=stage, config=config)


def test_values_that_cannot_be_known_are_refused(group):
    """No stage but 1, 2, 3; no number of accumulation steps that nobody can check; no float16."""
    with pytest.raises(ValueError, match=r"booster\.config\.zero_optimization\.stage=0; use 1, 2 or 3"):
        built(config={"zero_optimization": {"stage": 0}})
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1 contradicts accumulation_steps=None"):
        built(accumulation_steps=None, config={"gradient_accumulation_steps": 1})
    with pytest.raises(ValueError, match=r"dtype='fp16'.*\['bf16', 'fp32'\]"):
        built(dtype="fp16")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "SGD"}, r"booster\.config\.optimizer\.type='SGD' contradicts optim\.type='AdamW'"),
        (
            {"type": "adamw", "params": {"lr": 0.2}},
            r"\.optimizer\.params\.lr=0\.2 contradicts optim\.lr=0\.1; write 'auto'",
        ),
        ({"params": {"learning_rate": 0.1}}, r"\.optimizer\.params\.learning_rate: AdamW has none; there are .*'lr'"),
        (
            {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
            r"params\.betas=\[0\.9, 0\.95\] contradicts",
        ),
        ({"torch_adam": True}, r"\.optimizer\.torch_adam: has no effect"),
    ],
)
def test_an_optimizer_section_must_agree(section, message, group):
    """The optimizer is the one of `optim`; what the JSON says of it is compared."""
    with pytest.raises(ValueError, match=message):
        built(stage=2, config={"optimizer": section}).prepare(nn.Linear(2, 2), lambda ps: torch.optim.AdamW(ps, lr=0.1))


def test_auto_and_equal_values_are_filled_in():
    """What DeepSpeed is given: the program's values, and its own defaults for any other "auto"."""
    decided = Decided(stage=None, cpu_offload=None, dtype="bf16", grad_clip=0.5, accumulation_steps=4)
    written = {
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 4,
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    before = copy.deepcopy(written)
    done = complete_config(written, decided)
    assert written == before
    assert done["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert done["bf16"] == {"enabled": True} and done["fp16"] == {"enabled": False}
    assert done["gradient_clipping"] == 0.5 and "train_batch_size" not in done
    assert complete_config({}, decided)["gradient_clipping"] == 0.5
    assert complete_config({}, decided)["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_files_that_come_with_the_configs(stage, group):
    """They name their stage and leave the rest to the program."""
    booster = built(config=str(ROOT / f"configs/_base_/deepspeed/zero_stage{stage}_config.json"), dtype="bf16")
    assert (booster.dp_rank, booster.dp_size) == (0, 1)


def test_files_that_cannot_be_read(tmp_path):
    """Missing, not JSON, not an object, or a name twice: the error names the file and the place."""
    with pytest.raises(FileNotFoundError, match=r"booster\.config='no\.json': there is no such file"):
        read_config("no.json")
    path = tmp_path / "zero.json"
    for text, message in [
        ('{"a": }', r"zero\.json' cannot be read: .* line 1 column 7"),
        ("[]", r"zero\.json' holds a list"),
        ('{"a": 1, "a": 2}', r"'a' stands there twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(str(path))


def test_without_deepspeed_the_error_says_what_to_install(group, monkeypatch):
    """The booster is registered either way."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"booster\.type='deepspeed' cannot be used: .*requirements/deepspeed\.txt"):
        built()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_pieces_of_a_row_tile_every_tensor(world_size):
    """Ranks own every element of every parameter once, wherever the row is cut."""
    shapes = [(5,), (4, 6), (1,), (3, 7), (2,)]
    total = sum(math.prod(s) for s in shapes)
    length = -(-total // (2 * world_size)) * 2
    first = 0
    for shape in shapes:
        ranges = [cut(shape, first, rank, length) for rank in range(world_size)]
        owned = [(i, (first + i) // length) for i in range(math.prod(shape))]
        assert [(i, rank) for rank, r in enumerate(ranges) for i in range(r.start, r.stop)] == owned
        first += math.prod(shape)
