"""tools/plan.py predicts what can be counted: operations, memory, utilisation, coefficients from measured times."""

import ast
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

from opensora_like.config import read_config
from opensora_like.datasets.balance import Balance, balance_plan, utilisation
from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.cost import COEFFICIENTS, CostModel, Grid
from opensora_like.datasets.latent_store import StoreWriter, finish
from opensora_like.datasets.plan import build_plan, steps_in_epoch
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.table import read_table
from opensora_like.registry import MODELS, build
from opensora_like.settings import RunConfig
from opensora_like.training import measure, resources
from tools import plan as plan_tool

ROOT = Path(__file__).parents[2]
SMALL = {"type": "mmdit", **measure.SMALL["mmdit"]}
PUBLISHED = {
    "type": "mmdit",
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": (16, 56, 56),
    "fused_qkv": False,
    "use_liger_rope": True,
    "grad_ckpt_settings": (8, 100),
}


@pytest.mark.parametrize("options", [{}, {"cond_embed": True, "guidance_embed": True}, {"fused_qkv": True}])
def test_operations_are_those_that_torch_counts(options):
    """Forward: exactly; forward and backward with two of six blocks recomputed: within 2%, at an unmeasured size."""
    section = SMALL | {"grad_ckpt_settings": (1, 1)} | options
    work = measure.measure_work(measure.build_on_meta(section, where="model"), text_length=24)
    model = build(section, MODELS, where="model")
    inputs = measure.example_inputs(model, (3, 20, 24), text_length=24)
    # spelled out, because the counter does not know every fused kernel
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(*inputs)
        with FlopCounterMode(display=False) as step:
            model(*inputs).square().mean().backward()
    tokens = 3 * 10 * 12
    assert work.forward.at(tokens) == forward.get_total_flops()
    assert work.step.at(tokens) == pytest.approx(step.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "section",
    [
        {"type": "mmdit", "cond_embed": True},
        {"type": "flux", "fused_qkv": True, "use_liger_rope": True},
        {"type": "wan", "variant": "t2v-1.3B", "grad_checkpoint": True},
    ],
)
def test_memory_is_that_of_counted_tensors(section):
    """Saved tensors and the peak of a small bfloat16 model on the CPU are predicted within 3%."""
    error = measure.memory_error(section)
    assert abs(error.saved) < 0.03 and abs(error.peak) < 0.03
    assert measure.memory_error({"type": "another"}) is None


def test_the_published_model_is_counted_in_full():
    """11.9 billion parameters; forward near 2 operations per parameter and token; checkpointing costs less than 4/3."""
    model = measure.build_on_meta(PUBLISHED, where="model")
    work = measure.measure_work(model, text_length=512)
    assert sum(p.numel() for p in model.parameters()) == 11_891_178_560
    # modulation is computed once per sample, and text goes through its own stream
    assert 1.0 < work.forward.per_token / (0.5 * 11.9e9) < 2.5
    assert 3.0 < work.step.per_token / work.forward.per_token < 4.0
    assert work.forward.per_pair == 4 * (19 + 38) * 3072
    for name, before in (("stage1", 0.83), ("stage2", 0.53), ("stage2_i2v", 0.71)):
        settings = Config.fromfile(str(ROOT / f"configs/_base_/buckets_{name}.py"))
        buckets = compile_buckets(settings["bucket_config"], multiple=16)
        costs = resources.cost_model(work).of_buckets(buckets, Grid())
        plan = resources.uniform_plan(buckets, 20_000)
        assert utilisation(plan, costs, world_size=8) == pytest.approx(before, abs=0.012)
        balanced = balance_plan(plan, Balance(costs), seed=1)
        assert all(utilisation(balanced, costs, world_size=world) >= 0.97 for world in (8, 64))


@pytest.mark.parametrize(("name", "tokens"), [("t2v", 256), ("i2v", 144 + 252)])
def test_tokens_of_captions_are_known_without_the_encoders(name, tokens):
    """Those of HunyuanVideo's LLaMA, and of its LLaVA, whose embeddings hold the image's as well."""
    cfg = read_config(ROOT / f"configs/diffusion/train/hunyuan_video_{name}.py", []).config
    assert plan_tool._frozen(cfg, torch.nn.Linear(1, 1))[2] == tokens


def test_static_memory_is_cut_as_the_backend_cuts_it():
    """Bytes per parameter on 8 ranks of each layout, EMA in float32 over the ranks."""
    model = measure.build_on_meta(SMALL, where="model")
    num = sum(p.numel() for p in model.parameters())
    expected = {
        "ddp": 4 + 2 + 4 + 8,
        "zero0": 16,
        "zero1": 2 + 2 + 12 / 8,
        "zero2": 2 + 14 / 8,
        "zero3": 16 / 8,
        "fsdp2": 18 / 8,
    }
    for layout, per_parameter in expected.items():
        static = resources.static_memory(model, layout=layout, shards=8, ema=True)
        assert static.total - static.buffers == pytest.approx((per_parameter + 4 / 8) * num)
    assert (
        resources.layout_of({"type": "colossalai", "plugin": "hybrid", "plugin_config": {"zero_stage": 1}}) == "zero1"
    )
    with pytest.raises(ValueError, match="its memory is not known"):
        resources.layout_of({"type": "colossalai", "plugin": "zero9"})


CONFIG = """
model = dict(
    type="mmdit", in_channels=16, patch_size=2, hidden_size=96, num_heads=3, axes_dim=(8, 12, 12), depth=1,
    depth_single_blocks=2, context_in_dim=64, vec_in_dim=64, grad_ckpt_settings=(1, 1),
)
autoencoder = dict(type="patch", patch_size=2)
encoders = dict(text=dict(type="t5", max_length=16, tiny=dict(hidden_size=64, num_layers=1)))
dataset = dict(type="video_text", data_path="none.csv")
booster = dict(type="colossalai", plugin="zero2")
bucket_config = {"32px": {1: (1.0, 20), 5: (1.0, 6), 9: ((0.5, 0.25), 3)}, "48px": {1: (0.5, 8)}}
balance = dict(window=512, group=64)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Runs the tool in this process, in an empty folder. Returns: exit code, output, errors."""
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = plan_tool.main(["config.py", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_tool_prints_the_plan_and_fills_batches(plan):
    """Tables for memory, buckets and utilisation; proposed batches keep probabilities and compile; errors are lines."""
    code, out, errors = plan("--world-size", 16, "--gpu", "l40s", "--fill-batch-sizes")
    assert code == 0, errors
    for text in ("held in all", "32px/9", "48px/1", "data-parallel ranks", "an epoch:", "peak -", "saved -"):
        assert text in out, text
    proposed = json.loads(next(line for line in out.splitlines() if line.startswith('{"')))
    buckets = compile_buckets(proposed, multiple=4)
    assert buckets.config["32px"]["9"][:2] == [0.5, 0.25]
    sizes = {name: entry["1"][2] for name, entry in buckets.config.items()}
    assert sizes["32px"] > sizes["48px"] > 8
    ratio = re.findall(r"slowest / fastest micro-batch ([\d.]+)", out)
    assert float(ratio[1]) < min(1.05, float(ratio[0]))
    code, _, errors = plan("--world-size", 6, "--split", 4)
    assert code == 2 and errors.startswith("plan.py: --world-size 6 does not divide")
    code, _, errors = plan("--world-size", 0)
    assert code == 2 and errors.startswith("plan.py: --world-size 0 does not divide")
    code, _, errors = plan("--mfu", 0)
    assert code == 2 and errors.startswith("plan.py: --mfu 0.0 is a share")


def test_what_is_not_counted_is_told(plan):
    """Adapters and the second model of a distillation; a plain run has no such line."""
    lora = ["--lora_config", "{'r': 2, 'target_modules': ['q_proj']}"]
    code, out, errors = plan("--distill", "dict()", *lora)
    assert code == 0, errors
    assert "not counted: lora_config and distill; memory and times are of one model" in out
    assert "trained whole" not in plan()[1]


def test_an_epoch_is_that_of_the_table(plan, tmp_path):
    """Steps and hours are those of epoch 0 of a table, whole or in shards: a step takes as long as its slowest rank."""
    frames = np.random.default_rng(0).choice([1, 6, 30], 2000)
    same = {"text": ["x"] * 2000, "height": [48] * 2000, "width": [48] * 2000, "fps": [24.0] * 2000}
    columns = {"path": [str(i) for i in range(2000)], "num_frames": frames, **same}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    write_shards(tmp_path / "t.parquet", folder=tmp_path / "shards")
    buckets = compile_buckets(ast.literal_eval(CONFIG.split("bucket_config = ")[1].splitlines()[0]), multiple=4)
    epoch = build_plan(read_table(tmp_path / "t.parquet"), buckets, fps_max=24.0, seed=42, epoch=0)
    steps = steps_in_epoch(len(epoch), 4)
    for path in ("t.parquet", "shards"):
        code, out, errors = plan("--world-size", 4, "--dataset.data-path", path, "--balance", None)
        assert code == 0, errors
        cost = dict(re.findall(r"(per_\w+) (\S+)", out.split("cost in TFLOP: ")[1].split("\n\n")[0]))
        costs = CostModel(**{name: float(cost[name]) for name in COEFFICIENTS}).of_buckets(buckets, Grid(1, 4))
        slowest = costs[epoch.bucket_ids[: 4 * steps]].reshape(steps, 4).max(axis=1).mean()
        found = re.search(r"an epoch: (\d+) steps of (\S+) s, (\S+) h", out)
        assert int(found[1]) == steps and f"epoch 0 of {path}" in " ".join(out.split())
        assert float(found[2]) == pytest.approx(slowest / (resources.GPUS["h200"].tflops * 0.4), rel=0.01)
        assert float(found[3]) == pytest.approx(float(found[2]) * steps / 3600, rel=0.01)


def test_rows_that_are_left_out_are_in_no_plan(plan, tmp_path):
    """Neither those of dataset.quarantine nor those that validation.share holds out."""
    rows = range(400)
    table = ["path,text,num_frames,height,width,fps", *(f"{n}.mp4,x,9,48,48,24" for n in rows)]
    (tmp_path / "t.csv").write_text("\n".join(table))
    (tmp_path / "bad.csv").write_text("\n".join(["row,path", *(f"{n},{n}.mp4" for n in rows if n % 2)]))
    given = ["--world-size", 1, "--dataset.data-path", "t.csv", "--bucket-config.32px", "{9: (1.0, 4)}"]
    given += ["--bucket-config.48px", "{9: (0.0, 1)}"]
    for left_out, steps in (
        ([], {100}),
        (["--dataset.quarantine", "bad.csv"], {50}),
        (["--validation", "{'every': 1, 'share': 0.25}"], range(60, 90)),
    ):
        code, out, errors = plan(*given, *left_out)
        assert code == 0, errors
        assert int(re.search(r"an epoch: (\d+) steps", out)[1]) in steps


def make_store(folder, *names):
    """Of clips of 9 frames and 32 x 32 pixels, with embeddings of these names."""
    facts = {"latent_channels": 12, "temporal_stride": 1, "spatial_stride": 2, "is_causal": False}
    with StoreWriter(folder, fingerprint={"latents": {**facts, "has_deviation": False}}) as writer:
        for n in range(40):
            tensors = {"latents": torch.zeros(12, 9, 16, 16)} | {f"embeddings.{k}": torch.zeros(16, 64) for k in names}
            about = {"text": "x", "num_frames": 9, "height": 32, "width": 32, "fps": 24.0}
            writer.add(f"{n}", tensors, {"path": f"{n}.mp4", **about})
    finish(folder)


def test_what_is_cached_is_neither_held_nor_computed(plan, tmp_path):
    """On cached latents no autoencoder counts, and of the text encoders those without embeddings; the epoch is that
    of the store. A store that is not there yet is taken to have them all."""
    vae = {"type": "hunyuan_vae", "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    given = ["--world-size", 1, "--autoencoder", {**vae, "block_out_channels": (4, 4, 8, 8)}]
    (tmp_path / "buckets.py").write_text('bucket_config = {"32x32": {9: (1.0, 4)}}')
    given += ["--buckets", "buckets.py"]
    make_store(tmp_path / "whole", "text")
    make_store(tmp_path / "latents")
    held, per_sample, per_pixel = {}, {}, {}
    for name in ("videos", "whole", "latents", "absent"):
        dataset = {} if name == "videos" else {"type": "latents", "cache_path": name}
        code, out, errors = plan(*given, *(["--dataset", dataset] if dataset else []))
        assert code == 0, errors
        held[name] = float(re.search(r"frozen models\D+(\S+)", out)[1])
        cost = dict(re.findall(r"(per_\w+) (\S+)", out))
        per_sample[name], per_pixel[name] = float(cost["per_sample"]), float(cost["per_pixel"])
        assert ("does not exist" in out) == (name == "absent")
        assert name not in ("whole", "latents") or ("an epoch: 10 steps" in out and f"epoch 0 of {name}" in out)
    assert held["whole"] == held["absent"] == 0 < held["latents"] < held["videos"]
    assert per_sample["whole"] == per_sample["absent"] < per_sample["latents"] == per_sample["videos"]
    assert per_pixel["whole"] == per_pixel["latents"] == per_pixel["absent"] == 0 < per_pixel["videos"]


def test_measured_steps_give_coefficients(plan, tmp_path):
    """--measure writes two lines per rung, and --calibrate makes of them a cost that the config takes."""
    assert plan("--measure", "steps.jsonl", "--dtype", "fp32", "--repeats", 1)[0] == 0
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 8
    code, out, errors = plan("--calibrate", "steps.jsonl")
    assert code == 0, errors
    line = next(line for line in out.splitlines() if line.startswith("cost = "))
    call = ast.parse(line).body[0].value
    cost = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert sum(cost.values()) > 0
    assert RunConfig(**Config.fromfile("config.py").to_dict(), cost=cost).cost == cost
    assert all(0 <= value < math.inf for value in cost.values())
    buckets = compile_buckets(ast.literal_eval(CONFIG.split("bucket_config = ")[1].splitlines()[0]), multiple=4)
    seconds = CostModel(**cost).of_buckets(buckets, Grid(1, 4))
    assert (seconds > 0).all() and seconds.max() < 1000
    assert "data-parallel ranks" in plan("--cost", str(cost))[1]
    code, _, errors = plan("--calibrate", "none.jsonl")
    assert code == 2 and "does not exist; write it with --measure" in errors


@functools.cache
def _measured():
    model = measure.build_on_meta(SMALL, where="model")
    return measure.measure_work(model, text_length=24), measure.measure_memory(model, text_length=24)


def _prediction(rank, *, encode_bytes=0.0):
    """Of the small model on 4 x 8 x 8 latents, the autoencoder's peak proportional to pixels."""
    work, memory = _measured()
    encode = measure.EncodeUse(0.0, encode_bytes, 0.0, 0)
    return resources.Prediction(Grid(4, 16), resources.cost_model(work), memory, encode, None, rank)


SEVERAL = compile_buckets({"256px": {1: (1.0, 40), 17: (1.0, 8), 65: (1.0, 2)}, "512px": {1: (1.0, 4)}}, multiple=16)


@pytest.mark.parametrize("gpu", resources.GPUS)
def test_time_is_operations_over_peak_and_mfu(gpu):
    """On every GPU; ranks that share a sample take their part of operations and activations, not of what is held."""
    one, four = (
        _prediction(resources.Rank(resources.GPUS[gpu], 0.4, held=2.0**31, split=split)).of_rungs(SEVERAL)
        for split in (1, 4)
    )
    for alone, shared in zip(one, four, strict=True):
        assert alone.seconds == pytest.approx(alone.tflop / (resources.GPUS[gpu].tflops * 0.4))
        assert alone.tflop == pytest.approx(4 * shared.tflop)
        assert alone.gib - 2 == pytest.approx(4 * (shared.gib - 2))
        t, h, w = -(-alone.shape.num_frames // 4), alone.shape.height // 16, alone.shape.width // 16
        assert alone.tokens == t * h * w == max(Grid(4, 16).tokens(s) for s in _of_rung(alone.shape))


def _of_rung(shape):
    return [s for s in SEVERAL.shapes if s[:2] == shape[:2]]


@pytest.mark.parametrize("encode_bytes", [0.0, 200.0])
def test_filled_batches_are_the_largest_that_fit_in_memory_and_time(encode_bytes):
    """None is over the limit or slower than the slowest full one; one sample more of any would be."""
    prediction = _prediction(resources.Rank(resources.GPUS["h100"], 0.4, held=2.0**30), encode_bytes=encode_bytes)
    limit = 4.0
    filled = prediction.fill(SEVERAL, limit_gib=limit)
    slowest = max(use.seconds for use in filled)
    for use in filled:
        more = prediction.of(use.bucket, use.shape, use.batch_size + 1)
        assert use.gib <= limit
        assert more.gib > limit or more.seconds > slowest
        one_sample = prediction.of(use.bucket, use.shape, 1).seconds
        assert use.seconds > slowest - 1.01 * one_sample  # equal, up to the sample that does not fit
    with pytest.raises(ValueError, match=r"needs .* GiB for one sample, the limit is 1\.0"):
        prediction.fill(SEVERAL, limit_gib=1.001)


def test_the_command_stands_alone(tmp_path):
    """From another folder and without an installation, a wrong config is one line and exit code 2."""
    command = [sys.executable, str(ROOT / "tools/plan.py"), "none.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("plan.py: config 'none.py' does not exist")
