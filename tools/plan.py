"""Predict what a training config takes: memory per rank, step and epoch time, how busy the ranks are.

python tools/plan.py CONFIG --world-size 8 --gpu h200 [--mfu 0.4] [--buckets FILE] [--key value ...]
python tools/plan.py CONFIG --gpu h200 --fill-batch-sizes         proposes a batch size for every bucket
python tools/plan.py CONFIG --measure steps.jsonl                 times micro-batches of the config on this machine
python tools/plan.py CONFIG --calibrate steps.jsonl               prints the cost coefficients that fit such times

Nothing is trained and no weights are read; all but --measure needs no GPU. A line of steps.jsonl is
{"num_frames", "height", "width", "batch_size", "seconds"}; seconds of one micro-batch on one rank, from wherever.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Grid2D

from opensora_like.config import read_config
from opensora_like.datasets.balance import Balance, balance_plan, utilisation
from opensora_like.datasets.bucket import Buckets, compile_buckets
from opensora_like.datasets.cost import COEFFICIENTS, CostModel, Grid, Measured, calibrate
from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.plan import EpochPlan, steps_in_epoch
from opensora_like.models.base import encoders_of
from opensora_like.registry import MODELS, build, fit_arguments, resolve
from opensora_like.settings import RunConfig
from opensora_like.training import measure, resources
from opensora_like.training.batch_size import with_batch_sizes
from opensora_like.training.cached import KIND, cached_encoders
from opensora_like.training.data import build_dataset
from opensora_like.training.data_checks import build_outline
from opensora_like.training.held_out_loss import hold_out

WORLDS = (8, 64)  # at which utilisation is always printed
UNIFORM_MICRO_BATCHES = 20_000
# weights of published text encoders by the last part of their name
ENCODERS = {"t5-v1_1-xxl": 4.76e9, "umt5-xxl": 5.68e9, "clip-vit-large-patch14": 0.123e9}
# and by their type, where the name is that of a whole pipeline
ENCODERS |= {"llm": 7.5e9, "llava": 8.36e9, "clip": 0.123e9, "umt5": 5.68e9}
ENCODERS |= {"clip_vision": 0.632e9, "wav2vec2": 0.094e9, "loudness": 0.0}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--gpu", choices=sorted(resources.GPUS), default="h200")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's bf16 peak, recomputation counted")
    parser.add_argument(
        "--split", type=int, help="ranks that share a sample; default: sp_size * tp_size of the booster"
    )
    parser.add_argument("--layout", choices=sorted(resources.LAYOUTS), help="default: the booster's")
    parser.add_argument("--buckets", help="a file that sets bucket_config, in place of the config's")
    parser.add_argument("--memory-limit", type=float, default=0.92, help="share of the GPU's memory to fill")
    parser.add_argument("--fill-batch-sizes", action="store_true")
    parser.add_argument("--calibrate", metavar="FILE")
    parser.add_argument("--measure", metavar="FILE")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="of a micro-batch that --measure times")
    parser.add_argument("--repeats", type=int, default=5, help="of which --measure takes the median")
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Args: arguments: of the command line, None for this process'. Returns: the exit code."""
    args, overrides = parse_arguments(arguments)
    try:
        cfg = read_config(args.config, overrides, schema=RunConfig).config
        if args.buckets:
            cfg = dataclasses.replace(cfg, bucket_config=_bucket_config(args.buckets))
        return run(args, with_batch_sizes(cfg, args.world_size))
    except (ValueError, FileNotFoundError) as problem:
        print(f"plan.py: {problem}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, cfg: RunConfig) -> int:
    model, autoencoder = build_outline(cfg, None)
    grid = resources.grid_of(model, autoencoder)
    buckets = compile_buckets(cfg.bucket_config, multiple=grid.spatial)
    if args.measure:
        return measure_steps(args, cfg, buckets, grid)
    if args.calibrate:
        return print_calibration(args.calibrate, buckets, grid)
    console = Console(width=None if sys.stdout.isatty() else 140)
    prediction = predict(args, cfg, model, autoencoder, buckets, console)
    limit = args.memory_limit * prediction.rank.gpu.gib
    print_buckets(console, "Buckets, each at its heaviest ratio", prediction.of_rungs(buckets), buckets, limit)
    if args.fill_batch_sizes:
        filled = prediction.fill(buckets, limit_gib=limit)
        print_buckets(console, f"Proposed: equal time within {limit:.1f} GiB", filled, buckets, limit)
        print(json.dumps(_as_config(filled, buckets)))
    print_epoch(console, args, cfg, buckets, prediction)
    error = measure.memory_error(cfg.model)
    if error is None:
        console.print(f"memory model of {cfg.model['type']!r}: not compared, no small model of the kind is known")
    else:
        console.print(
            f"memory model against counted tensors of a small {cfg.model['type']!r}: saved {error.saved:+.1%}, "
            f"peak {error.peak:+.1%}"
        )
    return 0


def _bucket_config(path: str) -> dict:
    from mmengine.config import Config

    found = Config.fromfile(path).to_dict()
    if "bucket_config" not in found:
        raise ValueError(f"--buckets {path!r} sets {sorted(found)} and no bucket_config")
    return found["bucket_config"]


def predict(
    args: argparse.Namespace, cfg: RunConfig, model, autoencoder, buckets: Buckets, console: Console
) -> resources.Prediction:
    """Measure the parts on meta and print what a rank holds."""
    options = cfg.booster.get("plugin_config") or {}
    tp_size = int(options.get("tp_size", cfg.booster.get("tp_size", 1)) or 1)
    sp_size = int(options.get("sp_size", cfg.booster.get("sp_size", 1)) or 1)
    split = args.split or tp_size * sp_size
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu} is a share of the peak; give one above 0 and up to 1")
    if args.world_size < 1 or args.world_size % split:
        raise ValueError(f"--world-size {args.world_size} does not divide into groups of {split} that share a sample")
    layout = args.layout or resources.layout_of(cfg.booster)
    static = resources.static_memory(
        model,
        layout=layout,
        shards=args.world_size // tp_size,
        tp_size=tp_size,
        ema=cfg.ema_decay is not None,
        bucket_elements=int(options.get("reduce_bucket_size_in_m", 20)) * 2**20,
    )
    frozen, text_flops, text_length, notes = _frozen(cfg, autoencoder)
    work = measure.measure_work(model, text_length=text_length)
    memory = measure.measure_memory(model, text_length=text_length)
    by_pixels = sorted(buckets.shapes, key=lambda s: s.num_frames * s.height * s.width)
    encode = measure.EncodeUse(0.0, 0.0, 0.0, 0)
    if cfg.dataset.get("type") != KIND:
        encode = measure.measure_autoencoder(autoencoder, by_pixels[0], by_pixels[-1])
    cost = resources.cost_model(work, encode_flops_per_pixel=encode.flops_per_pixel, text_flops=text_flops)
    rank = resources.Rank(resources.GPUS[args.gpu], args.mfu, static.total + frozen, split)
    table = Grid2D(title=f"A rank of {args.world_size} x {args.gpu}, layout {layout}, {split} per sample", min_width=60)
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, value in {**static._asdict(), "frozen models": frozen}.items():
        table.add_row(name, f"{value / 2**30:.4g}")
    table.add_row("held in all", f"{rank.held / 2**30:.4g}")
    console.print(table)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"parameters {parameters:,} of the denoiser, {encode.num_parameters:,} of the autoencoder")
    console.print("cost in TFLOP: " + " ".join(f"{name} {getattr(cost, name):.4g}" for name in COEFFICIENTS))
    if uncounted := [name for name in ("lora_config", "distill") if getattr(cfg, name) is not None]:
        notes.append(f"not counted: {' and '.join(uncounted)}; memory and times are of one model that is trained whole")
    for note in notes:
        console.print(note)
    coded = getattr(autoencoder, "mini_batch_size", None)
    return resources.Prediction(resources.grid_of(model, autoencoder), cost, memory, encode, coded, rank)


def _frozen(cfg: RunConfig, autoencoder) -> tuple[float, float, int, list[str]]:
    """Bytes of the frozen models, operations of the text encoders per caption, text tokens, and notes."""
    cached, notes = _cached(cfg)
    held = 0.0
    if cached is None:
        held += sum(p.numel() for p in autoencoder.parameters()) * BYTES.get(cfg.autoencoder.get("dtype") or "fp32", 4)
    flops, length = 0.0, 0
    for name, section in cfg.encoders.items():
        if section.get("tiny") is not None:
            encoder = build(section, MODELS, where=f"encoders.{name}")
            elements, tokens = sum(p.numel() for p in encoder.parameters()), getattr(encoder, "max_length", 0)
        else:
            published = Path(str(section.get("from_pretrained"))).name
            elements = ENCODERS.get(published, ENCODERS.get(section.get("type"), 0.0))
            tokens = _text_tokens(name, section)
            if published not in ENCODERS and section.get("type") not in ENCODERS and name not in (cached or ()):
                notes.append(f"encoders.{name}: the size of {published!r} is not known, it is counted as 0")
        length = max(length, tokens)
        if name in (cached or ()):
            continue
        held += elements * BYTES.get(section.get("dtype") or "bf16", 2)
        flops += 2 * elements * tokens
    return held, flops, length or resources.DEFAULT_TEXT, notes


def _text_tokens(name: str, section: Mapping[str, Any]) -> int:
    """Of a caption, by an encoder that is not built; 0 for one of images or sound alone."""
    kind = resolve(section.get("type"), MODELS, where=f"encoders.{name}")
    if encoders_of("captioned image", {name: kind}):
        return kind.num_tokens(**section)
    return section.get("max_length", resources.DEFAULT_TEXT) if encoders_of("text", {name: kind}) else 0


def _cached(cfg: RunConfig) -> tuple[list[str] | None, list[str]]:
    """The encoders that a run on cached latents does not build, None for a run that reads videos; and a note on it."""
    if cfg.dataset.get("type") != KIND:
        return None, []
    folder = Path(str(cfg.dataset.get("cache_path")))
    if not folder.exists():
        names, why = list(cfg.encoders), f"store {str(folder)!r} does not exist, it is taken to have all embeddings"
    else:
        names, why = cached_encoders(cfg, open_store(folder)), f"store {str(folder)!r}"
    return names, [f"not built, since cached: the autoencoder, encoders {names} ({why})"]


def print_buckets(
    console: Console, title: str, uses: list[resources.BucketUse], buckets: Buckets, limit: float
) -> None:
    table = Grid2D(title=title)
    for name in ("bucket", "shape", "batch", "tokens", "TFLOP", "GiB", "seconds", ""):
        table.add_column(name, justify="left" if name in ("bucket", "shape", "") else "right")
    for use in uses:
        shape = f"{use.shape.height}x{use.shape.width}"
        numbers = (f"{use.tokens:,}", f"{use.tflop:,.4g}", f"{use.gib:.4g}", f"{use.seconds:.3g}")
        verdict = "" if use.gib <= limit else "too large"
        table.add_row(buckets.name(use.bucket), shape, str(use.batch_size), *numbers, verdict)
    console.print(table)
    seconds = [use.seconds for use in uses]
    console.print(f"slowest / fastest micro-batch {max(seconds) / min(seconds):.2f}")


def _as_config(uses: list[resources.BucketUse], buckets: Buckets) -> dict:
    """A bucket_config with the proposed batch sizes."""
    made: dict[str, dict[int, list]] = {}
    for use in uses:
        keep, skip, _ = buckets.config[use.shape.resolution][str(use.shape.num_frames)]
        probability = keep if skip == 0 else [keep, skip]
        made.setdefault(use.shape.resolution, {})[use.shape.num_frames] = [probability, use.batch_size]
    return made


def print_epoch(
    console: Console, args: argparse.Namespace, cfg: RunConfig, buckets: Buckets, prediction: resources.Prediction
) -> None:
    """How busy the ranks are with and without balance, and how long an epoch takes."""
    plan, source = _plan(cfg, buckets, prediction.grid)
    cost = prediction.cost
    if cfg.cost is not None:
        cost = CostModel(**fit_arguments(CostModel, {"type": "cost", **cfg.cost}, where="cost"))
    costs = cost.of_buckets(buckets, prediction.grid)
    options = fit_arguments(Balance, {"type": "balance", **(cfg.balance or {})}, where="balance", given={"costs": None})
    balanced = balance_plan(plan, Balance(costs, **options), seed=cfg.seed)
    table = Grid2D(title=f"Share of the ranks' time that is work: {source}")
    for name in ("data-parallel ranks", "random order", "balanced", "gain"):
        table.add_column(name, justify="right")
    dp_size = args.world_size // prediction.rank.split
    for world in sorted({dp_size, *WORLDS}):
        if len(plan) >= world * cfg.accumulation_steps:
            before, after = (
                utilisation(p, costs, world_size=world, accumulation=cfg.accumulation_steps) for p in (plan, balanced)
            )
            table.add_row(str(world), f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}x")
    console.print(table)
    used = balanced if cfg.balance is not None else plan
    steps = steps_in_epoch(len(used), dp_size * cfg.accumulation_steps)
    if not steps:
        console.print(f"no step: {len(used)} micro-batches, {dp_size * cfg.accumulation_steps} in a step")
        return
    seconds = prediction.cost.of_buckets(buckets, prediction.grid) / (
        prediction.rank.split * prediction.rank.gpu.tflops * prediction.rank.mfu
    )
    per_step = seconds[used.bucket_ids[: steps * dp_size * cfg.accumulation_steps]]
    slowest = per_step.reshape(steps, cfg.accumulation_steps, dp_size).sum(axis=1).max(axis=1)
    console.print(
        f"an epoch: {steps} steps of {slowest.mean():.3g} s, {slowest.sum() / 3600:.3g} h at mfu {args.mfu}, "
        f"{'balanced' if cfg.balance is not None else 'in random order (balance is None)'}; communication not counted"
    )


def _plan(cfg: RunConfig, buckets: Buckets, grid: Grid) -> tuple[EpochPlan, str]:
    paths = [cfg.dataset[key] for key in ("cache_path", "data_path") if cfg.dataset.get(key)]
    if not paths or not all(Path(path).exists() for path in paths):
        return resources.uniform_plan(buckets, UNIFORM_MICRO_BATCHES), "no table, clips of uniform length"
    dataset = build_dataset(cfg, multiple=grid.spatial)
    hold_out(cfg, dataset)
    return dataset.plan(0), f"epoch 0 of {paths[-1]}"


def measure_steps(args: argparse.Namespace, cfg: RunConfig, buckets: Buckets, grid: Grid) -> int:
    """Time forward and backward of the denoiser for one shape of every rung, in two batch sizes; append to the file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    section = {k: v for k, v in cfg.model.items() if k != "from_pretrained"}
    model = build(section, MODELS, where="model").to(device, dtype)
    autoencoder = measure.build_on_meta(cfg.autoencoder, where="autoencoder")
    text_length = _frozen(cfg, autoencoder)[2]
    done: set[str] = set()
    with Path(args.measure).open("a") as file:
        for bucket, shape in enumerate(buckets.shapes):
            full = int(buckets.batch_sizes[bucket])
            if buckets.name(bucket) in done or full * grid.tokens(shape) > args.max_tokens:
                continue
            done.add(buckets.name(bucket))
            latents = autoencoder.latent_shape(shape.num_frames, shape.height, shape.width)[1:]
            for batch_size in (full, full // 2 or 2):  # tells what is per micro-batch; and few buckets are enough then
                inputs = measure.example_inputs(model, latents, text_length=text_length, batch_size=batch_size)
                seconds = _time(model, inputs, device, repeats=args.repeats)
                print(
                    json.dumps({**shape._asdict(), "batch_size": batch_size, "seconds": seconds}), file=file, flush=True
                )
                print(f"{buckets.name(bucket)} batch {batch_size} seconds {seconds:.4f}")
    return 0


def _time(model: torch.nn.Module, inputs: tuple, device: torch.device, *, repeats: int) -> float:
    """The median of a few forwards and backwards, after two that warm up."""
    seconds = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        model(*inputs).float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    return float(np.median(seconds[2:]))


def print_calibration(path: str, buckets: Buckets, grid: Grid) -> int:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--calibrate {path!r} does not exist; write it with --measure")
    rows = [Measured.of(json.loads(line)) for line in file.read_text().splitlines() if line.strip()]
    fit = calibrate(rows, grid)
    written = ", ".join(f"{name}={getattr(fit.model, name):.6g}" for name in COEFFICIENTS)
    print(f"# {len(rows)} micro-batches, seconds predicted within {fit.mean_error:.1%}, at worst {fit.worst_error:.1%}")
    print(f"cost = dict({written})")
    costs = fit.model.of_buckets(buckets, grid)
    print(f"# buckets of this config: {costs.min():.4f} to {costs.max():.4f} s per micro-batch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
