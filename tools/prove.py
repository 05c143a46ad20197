"""Train a mode on the shapes world, where the right answer is known, and say whether it was learned.

python tools/prove.py i2v  [--demo outputs/demo] [--outputs outputs/demo_i2v] [--steps N]
python tools/prove.py lora [--demo outputs/demo] [--outputs outputs/demo_lora] [--steps N]
python tools/prove.py distill [--demo outputs/demo] [--outputs outputs/demo_distill] [--steps N]
python tools/prove.py wan     [--outputs outputs/demo_wan] [--steps N] [--num_clips N] [--num_sample N]
python tools/prove.py latents [--outputs outputs/demo_latents] [--steps N] [--num_clips N] [--num_sample N]
python tools/prove.py hunyuan_video [--outputs outputs/demo_hunyuan_video] [--steps N] [--num_clips N] [--num_sample N]
python tools/prove.py speech  [--outputs outputs/demo_speech] [--steps N] [--num_clips N]

i2v, lora and distill go on from the weights of `make demo`. i2v learns to go on from a first frame; it is scored on
new clips. lora learns magenta by adapters; it is scored on all five colours. distill learns, by adapters, to do in four
steps without guidance what takes the demo thirty with it; what the demo does in these four is told. wan and latents
begin from random weights: wan
prepares, trains and validates a small Wan denoiser by the commands of docs/wan.md; latents trains the demo's denoiser
behind a HunyuanVideo autoencoder of random weights, and reads samples before they are decoded. hunyuan_video trains a
small HunyuanVideo on text and on given first frames at once, and samples both ways. speech trains a small
FantasyTalking denoiser on clips whose shape is as large as their sound is loud, and goes on from the first frames of
new clips with their sound, and without. Exit code 1 when a number is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from opensora_like.cli import run_guarded  # noqa: E402
from opensora_like.evaluation.proofs import (  # noqa: E402
    Check,
    first_frame_psnr,
    sample,
    score_files,
    scores,
    write_first_frames,
)
from opensora_like.evaluation.world import DEFAULT_COLOURS  # noqa: E402
from tools.demo import run  # noqa: E402

NEW_COLOUR = "magenta"
NUM_REFERENCES = 96
NUM_FRESH = 400
NUM_SPOKEN = 64
EQUAL_DB = 200.0  # told of frames that are equal: json has no infinity
NUM_SEEN = 40  # combinations of the default world that are in its clips


def make_clips(folder: Path, *arguments: str, tool: str = "tools/make_shapes.py") -> Path:
    """Returns: the table."""
    run("making clips", tool, "--output", str(folder), *arguments)
    run("reading their sizes", "tools/meta.py", "--input", f"{folder}/clips.csv", "--output", f"{folder}/meta.csv")
    return folder / "meta.csv"


def from_demo(given: argparse.Namespace, table: Path) -> list[str]:
    """Overrides of a training that begins with the demo's weights."""
    return ["--model.from_pretrained", f"{given.demo}/train", "--dataset.data_path", str(table)]


def train(config: str, given: argparse.Namespace, *overrides: str) -> None:
    """On two processes, into the folder ``train``."""
    into = ["--outputs", str(given.outputs), "--exp_name", "train"]
    into += ["--steps", str(given.steps)] if given.steps else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    seconds = run("training", *launcher, "scripts/diffusion/train.py", config, *overrides, *into)
    print(f"training took {seconds:.0f} seconds, its start included")


def prove_i2v(given: argparse.Namespace) -> list[Check]:
    """Given frames stay what they were, and what follows moves as the text says."""
    train("configs/diffusion/train/demo_i2v.py", given, *from_demo(given, given.demo / "clips/meta.csv"))
    return go_on_from_frames("configs/diffusion/inference/demo_i2v.py", given, num=NUM_REFERENCES)


def go_on_from_frames(sampling: str, given: argparse.Namespace, *more: str, num: int) -> list[Check]:
    """Sample from the first frames of `num` new clips."""
    fresh = make_clips(given.outputs / "fresh", "--num_clips", str(num), "--seed", "1")
    prompts = write_first_frames(fresh, given.outputs / "references", num=num)
    sampled = sample(sampling, ["--ckpt-path", f"{given.outputs}/train", "--prompts", str(prompts), *more])
    shares = scores(sampled)
    return [
        Check("first frame, dB, the worst clip", min(EQUAL_DB, float(np.min(first_frame_psnr(sampled)))), 30),
        Check("direction", shares["direction_accuracy"], 0.85),
        Check("colour", shares["colour_accuracy"], 0.85),
    ]


def prove_lora(given: argparse.Namespace) -> list[Check]:
    """The new colour is there, and the old ones still are."""
    colours = ",".join((*DEFAULT_COLOURS, NEW_COLOUR))
    table = make_clips(given.outputs / "clips", "--num_clips", "2000", "--colours", colours)
    train("configs/diffusion/train/demo_lora.py", given, *from_demo(given, table))
    weights = ["--ckpt-path", str(given.demo / "train"), "--prompts", str(given.outputs / "clips/seen.csv")]
    adapters = ["--lora-checkpoint", str(given.outputs / "train")]
    sampled = sample("configs/diffusion/inference/demo.py", [*weights, *adapters])
    before = sample("configs/diffusion/inference/demo.py", weights)
    by_colour = {c: [s for s in sampled if f" {c} " in s.prompt.text] for c in (*DEFAULT_COLOURS, NEW_COLOUR)}
    untrained = scores([s for s in before if f" {NEW_COLOUR} " in s.prompt.text])["colour_accuracy"]
    print(f"{NEW_COLOUR} before the adapters: {untrained:.3f}")
    found = [Check(f"colour of {c} clips", scores(clips)["colour_accuracy"], 0.9) for c, clips in by_colour.items()]
    return [*found, Check("direction of all clips", scores(sampled)["direction_accuracy"], 0.85)]


def prove_distill(given: argparse.Namespace) -> list[Check]:
    """Scored is the student in four steps; what the teacher does in many and in these, and either in one, is told."""
    train("configs/diffusion/train/demo_distill.py", given, *from_demo(given, given.demo / "clips/meta.csv"))
    sampling, prompts = "configs/diffusion/inference/demo{}.py", ["--prompts", f"{given.demo}/clips/seen.csv"]
    teacher = ["--ckpt-path", f"{given.demo}/train", *prompts]
    alone, student = [["--lora-checkpoint", a] for a in ("None", f"{given.outputs}/train")]
    one = ["--few_step_times", "[1.0]", "--num_steps", "1"]
    shares = {
        "teacher, 30 steps with guidance": scores(sample(sampling.format(""), teacher)),
        "teacher, the student's 4 steps": scores(sample(sampling.format("_distill"), [*teacher, *alone])),
        "teacher, 1 step": scores(sample(sampling.format("_distill"), [*teacher, *alone, *one])),
        "student, 4 steps": scores(sample(sampling.format("_distill"), [*teacher, *student])),
        "student, 1 step": scores(sample(sampling.format("_distill"), [*teacher, *student, *one])),
    }
    tell(shares)
    return [
        Check("colour", shares["student, 4 steps"]["colour_accuracy"], 0.95),
        Check("direction", shares["student, 4 steps"]["direction_accuracy"], 0.85),
    ]


def prove_wan(given: argparse.Namespace) -> list[Check]:
    """Prepared, trained from the cache and validated, as docs/wan.md has it; what was not seen is only told."""
    config, cache = "configs/diffusion/train/demo_wan.py", given.outputs / "cache"
    table = make_clips(given.outputs / "clips", "--num_clips", str(given.num_clips))
    videos = {"type": "video_text", "data_path": str(table), "fps_in_caption": False}
    run("preparing", "tools/cache_latents.py", config, "--out", str(cache), "--dataset", repr(videos))
    train(config, given, "--dataset.cache_path", str(cache))
    size = ["--height", "16", "--width", "16", "--num_frames", "5", "--fps", "8"]
    sampler = ["--num_inference_steps", "30", "--guidance_scale", "3", "--batch_size", "40"]
    weights = ["--checkpoint", f"{given.outputs}/train/LATEST"]
    shares = {}
    for name, prompts, more in (
        ("seen", cache, ["--num_samples", str(given.num_sample * NUM_SEEN)]),
        ("held_out", given.outputs / "clips/held_out.csv", ["--num_sample", str(given.num_sample)]),
    ):
        folder = given.outputs / f"validation_{name}"
        options = ["--meta_folder", str(prompts), "--output_dir", str(folder), *more, *size, *sampler, *weights]
        run(f"validating, {name} combinations", "scripts/diffusion/validate.py", *options)
        shares[name] = score_files(folder / "validation.csv")
    tell(shares)
    return [
        Check("colour", shares["seen"]["colour_accuracy"], 0.95),
        Check("direction", shares["seen"]["direction_accuracy"], 0.85),
    ]


def prove_latents(given: argparse.Namespace) -> list[Check]:
    """Behind an autoencoder that nobody has trained; what it makes of clips is learned like any latents."""
    from opensora_like.evaluation import proof_latents as latents

    sampling = "configs/diffusion/inference/demo_latents.py"
    table = make_clips(given.outputs / "clips", "--num_clips", str(given.num_clips))
    fresh = make_clips(given.outputs / "fresh", "--num_clips", str(min(NUM_FRESH, given.num_clips)), "--seed", "1")
    flags = latents.prepare_autoencoder(sampling, given.outputs / "autoencoder.safetensors", table)
    print(f"the autoencoder: {' '.join(flags)}")
    train("configs/diffusion/train/demo_latents.py", given, "--dataset.data_path", str(table), *flags)
    flags += ["--ckpt-path", f"{given.outputs}/train", "--num_sample", str(given.num_sample)]
    shares = latents.read_samples(sampling, flags, clips=given.outputs / "clips", fresh=fresh)
    tell(shares)
    return [
        Check("colour read off latents of new clips", shares["fresh"]["colour_accuracy"], 0.97),
        Check("direction read off latents of new clips", shares["fresh"]["direction_accuracy"], 0.95),
        Check("colour", shares["seen"]["colour_accuracy"], 0.9),
        Check("direction", shares["seen"]["direction_accuracy"], 0.85),
    ]


def prove_hunyuan_video(given: argparse.Namespace) -> list[Check]:
    """One model for text and for given frames, which take the place of noise."""
    sampling = "configs/diffusion/inference/demo_hunyuan_video.py"
    table = make_clips(given.outputs / "clips", "--num_clips", str(given.num_clips))
    train("configs/diffusion/train/demo_hunyuan_video.py", given, "--dataset.data_path", str(table))
    weights = ["--ckpt-path", f"{given.outputs}/train", "--num_sample", str(given.num_sample)]
    names = ("seen", "held_out")
    prompts = {name: ["--prompts", f"{given.outputs}/clips/{name}.csv"] for name in names}
    shares = {name: scores(sample(sampling, [*weights, *prompts[name]])) for name in names}
    tell(shares)
    one_each = ["--cond-type", "i2v_head", "--num_sample", "1"]
    going_on = go_on_from_frames(sampling, given, *one_each, num=min(NUM_REFERENCES, given.num_clips))
    return [
        Check("colour", shares["seen"]["colour_accuracy"], 0.95),
        Check("direction", shares["seen"]["direction_accuracy"], 0.85),
        *(check._replace(name=f"given a frame: {check.name}") for check in going_on),
    ]


def prove_speech(given: argparse.Namespace) -> list[Check]:
    """What is shown follows what is heard, and does not where nothing is."""
    from opensora_like.evaluation import speaking

    tool, sampling = "tools/make_speech.py", "configs/diffusion/inference/demo_speech.py"
    num = min(NUM_SPOKEN, given.num_clips)
    table = make_clips(given.outputs / "clips", "--num_clips", str(given.num_clips), tool=tool)
    train("configs/diffusion/train/demo_speech.py", given, "--dataset.data_path", str(table))
    fresh = make_clips(given.outputs / "fresh", "--num_clips", str(num), "--seed", "1", tool=tool)
    prompts = write_first_frames(fresh, given.outputs / "references", num=num, sounds=True)
    weights = ["--ckpt-path", f"{given.outputs}/train", "--prompts", str(prompts)]
    found = {
        name: speaking.mean_correlation(sample(sampling, [*weights, *more]))
        for name, more in (("heard", []), ("unheard", ["--model.audio_scale", "0.0"]))
    }
    print(", ".join(f"correlation of size and loudness, {name}: {value:.3f}" for name, value in found.items()))
    return [
        Check("correlation of size and loudness", found["heard"], 0.8),
        Check("0.25 less its amount without sound", 0.25 - abs(found["unheard"]), 0.0),
    ]


def tell(shares: Mapping[str, Mapping[str, float]]) -> None:
    for name, found in shares.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))


PROOFS: dict[str, Callable[[argparse.Namespace], list[Check]]] = {
    "i2v": prove_i2v,
    "lora": prove_lora,
    "distill": prove_distill,
    "wan": prove_wan,
    "latents": prove_latents,
    "hunyuan_video": prove_hunyuan_video,
    "speech": prove_speech,
}
FROM_DEMO = ("i2v", "lora", "distill")


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=sorted(PROOFS))
    parser.add_argument("--demo", type=Path, default=None, help="folder that make demo wrote; default outputs/demo")
    parser.add_argument("--outputs", type=Path, default=None, help="default: outputs/demo_MODE; it is emptied")
    parser.add_argument("--steps", type=int, default=None, help="updates; default: the config's")
    parser.add_argument("--num_clips", type=int, default=None, help="to train on, 40 or more; default 2000")
    parser.add_argument("--num_sample", type=int, default=None, help="of each combination; default 4")
    given = parser.parse_args(arguments)
    goes_on = given.mode in FROM_DEMO
    unread = ("num_clips", "num_sample") if goes_on else ("demo", "num_sample") if given.mode == "speech" else ("demo",)
    if ignored := [name for name in unread if getattr(given, name) is not None]:
        raise ValueError(f"{given.mode} does not read {['--' + name for name in ignored]}; remove it")
    given.num_clips = 2000 if given.num_clips is None else given.num_clips
    given.num_sample = 4 if given.num_sample is None else given.num_sample
    if given.num_clips < NUM_SEEN:
        raise ValueError(f"--num_clips {given.num_clips} must be {NUM_SEEN} or more, so that each combination is there")
    given.demo = (given.demo or Path("outputs/demo")).resolve()
    given.outputs = (given.outputs or ROOT / f"outputs/demo_{given.mode}").resolve()
    if goes_on and not (given.demo / "train").is_dir():
        raise FileNotFoundError(f"{str(given.demo / 'train')!r} is not there; run make demo first, or give --demo")

    def work() -> int:
        shutil.rmtree(given.outputs, ignore_errors=True)  # its own folder: what is shown belongs to this run
        checks = PROOFS[given.mode](given)
        print("\n".join(str(check) for check in checks))
        (given.outputs / "proof.json").write_text(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
        return int(any(check.found < check.least for check in checks))

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
