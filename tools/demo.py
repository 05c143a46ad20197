"""The demo: make clips of a tiny world, train a text-to-video model on them, sample, score, report.

python tools/demo.py [--outputs outputs/demo] [--num_clips 2000] [--steps N]   (`make demo` runs it)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from opensora_like.evaluation.demo import score_and_report, write_prompts  # noqa: E402

TRAIN_CONFIG = "configs/diffusion/train/demo.py"
SAMPLE_CONFIG = "configs/diffusion/inference/demo.py"


def run(title: str, *command: str) -> float:
    """Run one stage in its own process and let its output through. Returns: seconds.

    Raises:
        SystemExit: it failed.
    """
    print(f"\n== {title}\n{' '.join(command)}", flush=True)
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"demo: {title} failed with exit code {done.returncode}; its message is above")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--num_clips", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=None, help="updates; default: the config's")
    parser.add_argument("--num_processes", type=int, default=None, help="default: one per GPU, or two on CPUs")
    arguments = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    num_processes = arguments.num_processes or num_gpus or min(2, os.cpu_count() or 1)
    folder = (ROOT / arguments.outputs).resolve()
    clips, train, samples = folder / "clips", folder / "train", folder / "samples"
    if folder.exists():
        shutil.rmtree(folder)  # the demo's own folder: what is shown belongs to this run

    run("making clips", "tools/make_shapes.py", "--output", str(clips), "--num_clips", str(arguments.num_clips))
    run("reading their sizes", "tools/meta.py", "--input", f"{clips}/clips.csv", "--output", f"{clips}/meta.csv")
    overrides = ["--dataset.data_path", f"{clips}/meta.csv", "--outputs", str(folder), "--exp_name", train.name]
    if num_gpus:
        overrides += ["--dtype", "bf16"]
    if arguments.steps is not None:
        overrides += ["--steps", str(arguments.steps)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    seconds = run("training", *launcher, "scripts/diffusion/train.py", TRAIN_CONFIG, *overrides)
    prompts = write_prompts(clips, folder / "prompts.csv")
    weights = ["--ckpt-path", str(train), "--prompts", str(prompts), "--save-dir", str(samples)]
    run("sampling", "scripts/diffusion/inference.py", SAMPLE_CONFIG, *weights)
    metrics = score_and_report(folder, train_seconds=seconds, world_size=num_processes)
    print(json.dumps(metrics, indent=1))
    print(f"\nreport: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
