"""What boosters refuse, and their parts that need no second process."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from torch import nn

from opensora_like.boosters import layout
from opensora_like.boosters.colossalai_import import OPTIONAL, import_colossalai, stand_ins
from opensora_like.boosters.colossalai_options import read_hybrid_options, read_options
from opensora_like.boosters.update import OptimizerState
from opensora_like.registry import BOOSTERS, build

CPU = torch.device("cpu")


def built(**section):
    return build(section, BOOSTERS, where="booster", device=CPU, dtype="fp32", grad_clip=0.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reduce_bucket_size": 20}, r"booster\.plugin_config\.reduce_bucket_size: .*reduce_bucket_size_in_m"),
        ({"tp_size": 2}, r"booster\.plugin_config\.tp_size: plugin 'zero2' has no such option"),
        ({"reduce_bucket_size_in_m": "20"}, r"booster\.plugin_config\.reduce_bucket_size_in_m='20' must be int"),
        ({"reduce_bucket_size_in_m": 0}, r"reduce_bucket_size_in_m=0 must be 1 or more"),
        ({"communication_dtype": "fp8"}, r"booster\.plugin_config\.communication_dtype='fp8'"),
        ({"master_weights": False}, r"booster\.plugin_config\.master_weights=False"),
        ({"initial_scale": 65536.0}, r"booster\.plugin_config\.initial_scale=65536\.0: only float16"),
        ({"overlap_communication": True}, r"booster\.plugin_config\.overlap_communication=True needs a GPU"),
    ],
)
def test_plugin_config_is_checked_by_name_and_value(config, message):
    """Anything unknown, of another type, or without effect is an error that names the key."""
    with pytest.raises(ValueError, match=message):
        built(type="colossalai", plugin="zero2", plugin_config=config)


# plugin_config of Open-Sora v2's published configs, for training and with plugins/sp and plugins/tp for inference
BUCKETS = {"reduce_bucket_size_in_m": 128, "overlap_allgather": False}
HYBRID = {"tp_size": 1, "pp_size": 1, "sp_size": 1, "zero_stage": 2, "overlap_allgather": False}
SEQUENCE = {"sequence_parallelism_mode": "ring_attn", "enable_sequence_parallelism": True, "static_graph": True}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("read", "plugin", "config"),
    [
        (read_options, "zero2", BUCKETS),
        (read_hybrid_options, "hybrid", HYBRID | SEQUENCE | BUCKETS | {"sp_size": 4}),
        (read_hybrid_options, "hybrid", HYBRID | SEQUENCE | {"sp_size": 8}),
        (read_hybrid_options, "hybrid", HYBRID | {"tp_size": 8}),
    ],
)
def test_published_plugin_configs_are_taken_as_they_are(read, plugin, config, device):
    """Each of their keys arrives with its value."""
    options = read(config, plugin=plugin, device=torch.device(device))
    assert {key: getattr(options, key) for key in config} == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("precision", "bf16", "it is the run's dtype"),
        ("initial_scale", 65536.0, "only float16"),
        ("max_norm", 1.0, "it is the run's grad_clip"),
        ("cast_inputs", False, "models cast their inputs themselves"),
        ("enable_metadata_cache", False, "it is of pipelines"),
        ("custom_policy", None, r"the model's parallel_plan\(\)"),
        ("zero_bucket_size_in_m", 20, r"did you mean \['reduce_bucket_size_in_m'\]"),
    ],
)
def test_what_open_sora_hands_to_colossalai_besides_is_refused_by_name(key, value, message):
    """These are no keys of ours; the error names the key and says where it belongs, or that it can go."""
    with pytest.raises(ValueError, match=rf"booster\.plugin_config\.{key}\b.*{message}"):
        read_hybrid_options({key: value}, plugin="hybrid", device=CPU)


@pytest.mark.parametrize("plugin", ["moe", "zero3"])
def test_an_unavailable_plugin_is_refused_with_the_available_ones(plugin):
    """Not every plugin of ColossalAI is here; the error lists those that are."""
    with pytest.raises(ValueError, match=rf"booster\.plugin='{plugin}' .*'hybrid', 'zero1', 'zero1-seq', 'zero2'"):
        built(type="colossalai", plugin=plugin)


def test_communication_overlaps_where_the_device_can():
    """Left out, the option follows the device."""
    assert read_options({}, plugin="zero2", device=CPU).overlap_communication is False
    assert read_options({}, plugin="zero2", device=torch.device("cuda")).overlap_communication is True


@pytest.mark.parametrize("kind", ["ddp", "colossalai"])
def test_numbers_that_no_booster_honours(kind):
    """fp16 would need a scaled loss; a negative norm means nothing."""
    with pytest.raises(ValueError, match=r"dtype='fp16'.*\['bf16', 'fp32'\]"):
        build({"type": kind}, BOOSTERS, where="booster", device=CPU, dtype="fp16", grad_clip=0.0)
    with pytest.raises(ValueError, match="grad_clip=-1"):
        build({"type": kind}, BOOSTERS, where="booster", device=CPU, dtype="fp32", grad_clip=-1.0)


def test_models_that_cannot_be_trained():
    """Nothing to train, or something on meta that no checkpoint fills."""
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        built(type="ddp").prepare(frozen, torch.optim.SGD)
    half = nn.Linear(2, 2, device="meta")
    half.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 frozen tensors on meta, \['bias'\]"):
        built(type="ddp").prepare(half, torch.optim.SGD)


def test_unknown_optimizers_are_refused_before_training():
    """An optimizer whose state would be missing from checkpoints is an error at the start."""
    with pytest.raises(ValueError, match=r"optim\.type='Rprop'"):
        built(type="ddp").prepare(nn.Linear(2, 2), torch.optim.Rprop)


def test_ddp_needs_no_process_group():
    """A plain script: prepare, step, gather."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    booster = built(type="ddp")
    called = booster.prepare(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    with booster.micro_batch(last=True):
        booster.backward(called(torch.ones(1, 3)).square().sum())
    assert math.isfinite(booster.step())
    whole = booster.gather(dict(booster.master_shards()))
    assert torch.equal(whole["weight"], model.weight) and whole["weight"].data_ptr() != model.weight.data_ptr()
    assert booster.optimizer_shards()["step"]["bias"].shape == ()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 6), (3, 7, 2)])
def test_ranges_tile_every_tensor(shape, world_size):
    """Ranks own everything once, in order, in parts of one length but the last."""
    parts = [layout.even_range(shape, rank, world_size) for rank in range(world_size)]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(math.prod(shape)))
    assert max(p.stop - p.start for p in parts) == layout.part_length(math.prod(shape), world_size)


@pytest.mark.parametrize("most", [1, 5, 9, 100])
def test_buckets_hold_every_tensor_once_in_order(most):
    """None has more elements than allowed, but one that is a single tensor, and no two neighbours would fit in one."""
    tensors = [torch.empty(n) for n in (3, 2, 7, 1, 1, 4)]
    found = list(layout.buckets(tensors, most))
    sizes = [sum(t.numel() for t in bucket) for bucket in found]
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert all(size <= most or len(bucket) == 1 for size, bucket in zip(sizes, found, strict=True))
    assert all(a + bucket[0].numel() > most for a, bucket in zip(sizes, found[1:], strict=False))


class CountsInPython(torch.optim.Optimizer):
    """Adam's state as HybridAdam keeps it: the counter is an int."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.999)})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] += 1


def test_a_counter_in_python_is_saved_and_restored():
    """It is handed out as a tensor and taken back when a load is over."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = CountsInPython([parameter])
    state = OptimizerState(optimizer, {"p": parameter}, lambda name, whole: whole.view(-1))
    assert state.shards()["step"]["p"] == 0
    optimizer.step()
    shards = state.shards()
    assert shards["step"]["p"] == 1
    shards["step"]["p"].copy_(torch.tensor(7))
    state.read_counters()
    assert optimizer.state[parameter]["step"] == 7 and type(optimizer.state[parameter]["step"]) is int


def test_placeholders_are_there_only_while_needed():
    """Classes can be named and inherited from, not made; afterwards nobody believes that bitsandbytes is installed."""
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name.partition(".")[0]) is None]
    if not absent:
        pytest.skip("galore_torch and bitsandbytes are installed")
    before = dict(sys.modules)
    with stand_ins():
        for name in absent:
            base = sys.modules[name].Anything
            with pytest.raises(ImportError, match=rf"{name}\.Anything was asked for, but '{name}' is not installed"):
                base()
            assert not hasattr(sys.modules[name], "__version__")
    assert dict(sys.modules) == before


def test_torch_keeps_its_kernels_for_meta():
    """ColossalAI brings its own for the whole process, which fail where a layer norm has no bias."""
    import_colossalai()
    norm = nn.LayerNorm(8, bias=False, device="meta")
    norm(torch.empty(2, 8, device="meta", requires_grad=True)).sum().backward()
    assert norm.weight.grad.shape == (8,)
