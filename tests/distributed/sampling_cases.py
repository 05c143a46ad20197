"""Samples toy videos in several processes and writes what came out, for the tests.

    torchrun --nproc_per_node 2 sampling_cases.py FOLDER CHECKPOINT FLUX

Leaders write ``CASE.pt``: the videos; every rank writes ``rank{R}.json``: which files it made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.sampling import build_sampling
from opensora_like.evaluation.shared_video import is_leader, join_group
from opensora_like.runtime import Runtime
from opensora_like.settings import InferenceConfig

CONFIG = Path(__file__).parents[1] / "training/toy_inference.py"
COMMON = ["--num-steps", "12", "--num-sample", "2", "--batch-size", "2"]  # beyond the steps with steady guidance
SIZES = ["--height", "14", "--width", "14"]  # 245 latent tokens and 16 of text: two ranks cannot have the same number
# name -> flags; {ref} is a picture
SHARED = {
    "ring": [*SIZES, "--sp-mode", "ring"],
    "all_to_all": [*SIZES, "--sp-mode", "all_to_all", "--sampler", "unipc"],
    "image": ["--num-sample", "3", "--cond-type", "i2v_head", "--ref", "{ref}", "--offload", "True"],
}


def flags_of(name: str, folder: Path, checkpoint: str) -> list[str]:
    """The command line of a case without its sp_size."""
    own = [word.format(ref=folder / "ref.png") for word in SHARED[name]]
    return ["--ckpt-path", checkpoint, "--prompt", "a cat", *COMMON, *own]


def sampled(flags: list[str], runtime: Runtime) -> torch.Tensor | None:
    """All videos, None on the ranks that follow."""
    config = read_config(CONFIG, flags, schema=InferenceConfig).config
    sequence = join_group(config, runtime)
    generator = VideoGenerator(config, torch.device("cpu"), sequence=sequence)
    if not is_leader(sequence):
        return generator.follow()
    videos = [s.video_CTHW for s in generator.sample(read_prompts(config))]
    generator.finish()
    return torch.stack(videos)


def files_of(checkpoint: str, runtime: Runtime, *arguments: str) -> list[str]:
    """Names of the files that this rank makes."""
    config = read_config(CONFIG, ["--ckpt-path", checkpoint, *arguments], schema=InferenceConfig).config
    written = [path.name for path in build_sampling(config, runtime)()]
    dist.barrier()  # the case that follows looks at the files of all ranks
    return written


def refusal(checkpoint: str, runtime: Runtime, *arguments: str) -> str:
    """What a run that cannot be made says on this rank."""
    try:
        files_of(checkpoint, runtime, *arguments)
    except ValueError as problem:
        return str(problem)
    return "no error"


def main(folder: Path, checkpoint: str, flux: str) -> None:
    runtime = rt.start()
    for name in SHARED:
        videos = sampled([*flags_of(name, folder, checkpoint), "--sp-size", "2"], runtime)
        if videos is not None:
            torch.save(videos, folder / f"{name}.pt")
    prompts = ["--prompts", str(folder / "p.csv"), "--num-sample", "2"]
    image = ["--cond-type", "i2v_head", "--first-image.type", "flux_image", "--first-image.from-pretrained", flux]
    image += [
        "--first-image.resolution",
        "64px",
        "--first-image.num-steps",
        "1",
        "--first-image.share-encoders",
        "True",
    ]
    found = {
        "shares": files_of(checkpoint, runtime, *prompts, "--save-dir", str(folder / "shares")),
        "again": files_of(checkpoint, runtime, *prompts, "--save-dir", str(folder / "shares")),
        "together": files_of(
            checkpoint, runtime, *prompts, *image, "--sp-size", "all", "--save-dir", str(folder / "together")
        ),
        "fewer": files_of(checkpoint, runtime, "--prompt", "a cat", "--save-dir", str(folder / "fewer")),
        "refused": refusal(checkpoint, runtime, "--prompt", "x", "--sp-size", "3"),
        "other": refusal(checkpoint, runtime, *prompts, "--seed", "1", "--save-dir", str(folder / "shares")),
    }
    (folder / f"rank{runtime.rank}.json").write_text(json.dumps(found))
    rt.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
