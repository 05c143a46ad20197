"""The commands that Open-Sora v2's guide prints run here as they are printed.

They run in a folder that looks as the guide assumes: configs/, scripts/, ckpts/, datasets/, outputs/. Changed are
sizes: 2 processes in place of 8 and 64, a model of a few thousand weights, buckets of 64px, 2 steps, and a hostfile
with this machine. Not run are the lines that download (`pip install`, `huggingface-cli download`); what they bring is
put there.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from opensora_like.checkpoint.layout import complete_checkpoints
from opensora_like.datasets.video_io import probe
from opensora_like.datasets.video_writing import write_image, write_video
from tests.evaluation.local_server import LanguageModel, serving
from tests.stand_ins import HUNYUAN, MMDIT, WIDTH, save_clip, save_flux, save_hunyuan_vae, save_mmdit, save_t5

ROOT = Path(__file__).parent.parent
NUM_CLIPS = 12
MEASURE = "python scripts/cnv/meta.py --input datasets/pexels_45k.csv"
TRAIN = (
    "torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py "
    "--dataset.data-path datasets/pexels_45k_necessary.csv"
)
SAMPLE = "torchrun --nproc_per_node 1 --standalone scripts/diffusion/inference.py configs/diffusion/inference"

# what is appended to copies of fragments and configs: sizes, and nothing else
TINY = {
    "_base_/opensora_v2_model.py": f"""
model.update({ {**MMDIT, "vec_in_dim": WIDTH}!r})
autoencoder.update({ {**HUNYUAN, "dtype": "fp32"}!r})
encoders["text"].update(max_length=16, dtype="fp32")
encoders["pooled"].update(dtype="fp32")
""",
    "_base_/opensora_v2_train.py": '\nsteps = 2\nnum_workers = 1\nlog_every = 1\ndtype = "fp32"\n',
    "_base_/buckets_stage1.py": '\nbucket_config = {"64px": {1: (1.0, 2), 5: (1.0, 2)}}\n',
    "diffusion/inference/256px.py": '\nresolution = "64px"\nnum_frames = 5\nnum_steps = 2\ndtype = "fp32"\n',
    "diffusion/inference/t2i2v_256px.py": '\nfirst_image.update(resolution="64px", num_steps=1)\n',
    "diffusion/inference/t2i2v_768px.py": '\nresolution = "64px"\n',
}


class Workplace:
    """A folder, and a shell in it.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
        self.environment = kept | {
            "PATH": binaries,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }

    def shell(self, command: str, **environment: str) -> str:
        """Run a line as a user would type it. Returns: all that it said."""
        done = subprocess.run(
            ["bash", "-c", command.replace("--nproc_per_node 8", "--nproc_per_node 2")],
            cwd=self.folder,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
        return done.stdout

    def run(self, name: str) -> Path:
        """The folder of a training run."""
        return self.folder / "outputs" / name

    def steps(self, name: str) -> list[int]:
        """Steps that a run has logged."""
        return [row["step"] for row in self.metrics(name)]

    def metrics(self, name: str) -> list[dict]:
        """Its rows of metrics."""
        return [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]

    def log(self, name: str) -> str:
        """What it said."""
        return (self.run(name) / "log.txt").read_text()

    def saved(self, name: str) -> list[str]:
        """Its checkpoints."""
        return [path.name for path in complete_checkpoints(self.run(name))]


def shrink_configs(folder: Path) -> None:
    """Copy all configs, and append the tiny sizes."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, text in TINY.items():
        with (folder / "configs" / name).open("a") as file:
            file.write(text)


def put_weights(folder: Path) -> None:
    """Stand-ins under the published names."""
    ckpts = folder / "ckpts"
    save_t5(ckpts / "google/t5-v1_1-xxl")
    save_clip(ckpts / "openai/clip-vit-large-patch14")
    save_flux(ckpts / "FLUX.1-dev", with_encoders=False)
    save_hunyuan_vae(ckpts / "hunyuan_vae.safetensors")
    save_mmdit(ckpts / "Open_Sora_v2.safetensors", cond_embed=True)
    save_mmdit(ckpts / "flux1-dev-fused-rope.safetensors", guidance_embed=True)


def put_archive(folder: Path) -> None:
    """The dataset as it is downloaded: a tar cut in two, and a csv with path and text."""
    download = folder / "datasets/open-sora-pexels-45k"
    clips = folder / "made/pexels_45k"
    clips.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(NUM_CLIPS - 3):
        write_video(clips / f"{number}.mp4", draws.integers(0, 256, (9, 64, 96, 3), dtype=np.uint8), 24)
    for number in range(NUM_CLIPS - 3, NUM_CLIPS):
        write_image(clips / f"{number}.png", draws.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    (download / "tar").mkdir(parents=True)
    with tarfile.open(folder / "made/all.tar", "w") as archive:
        archive.add(clips, "pexels_45k")
    data = (folder / "made/all.tar").read_bytes()
    for number, part in enumerate((data[: len(data) // 2], data[len(data) // 2 :])):
        (download / f"tar/pexels_45k.tar.{number:03d}").write_bytes(part)
    rows = [f"datasets/pexels_45k/{path.name},a clip number {path.stem}" for path in sorted(clips.iterdir())]
    (folder / "datasets/pexels_45k.csv").write_text("path,text\n" + "\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """The folder before the first command."""
    folder = tmp_path_factory.mktemp("open_sora")
    shrink_configs(folder)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "hostfiles").write_text("127.0.0.1\n")
    put_weights(folder)
    put_archive(folder)
    yield Workplace(folder)
    shutil.rmtree(folder)


def test_the_dataset_is_prepared(place: Workplace) -> None:
    """The archive is joined, unpacked and measured, with one process and with many; the table is cut into shards."""
    place.shell(
        "cd datasets/open-sora-pexels-45k\n"
        "cat tar/pexels_45k.tar.* > pexels_45k.tar\ntar -xvf pexels_45k.tar\nmv pexels_45k .."
    )
    nec = place.folder / "datasets/pexels_45k_nec.csv"
    place.shell(f"{MEASURE} --output datasets/pexels_45k_nec.csv --num_workers 0")
    alone = nec.read_text()
    nec.unlink()
    place.shell(f"{MEASURE} --output datasets/pexels_45k_nec.csv --num_workers 2")
    assert nec.read_text() == alone
    with nec.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {"path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"}
    assert columns <= rows[0].keys() and len(rows) == NUM_CLIPS
    assert {(row["num_frames"], row["height"], row["width"]) for row in rows} == {("9", "64", "96"), ("1", "64", "96")}
    shutil.copyfile(nec, place.folder / "datasets/pexels_45k_necessary.csv")
    place.shell(f"{MEASURE} --output datasets/dataset.parquet --num_workers 0")
    place.shell("python scripts/cnv/shard.py datasets/dataset.parquet")
    assert list((place.folder / "datasets/dataset").glob("*.parquet"))


def test_training_begins(place: Workplace) -> None:
    """From scratch, with a learning rate and the other switches of the guide on the command line; all take effect."""
    place.shell(f"{TRAIN} --exp-name your_experiment --lr 3e-4 --wandb True --async-io True --ema-decay 0.9")
    assert place.steps("your_experiment") == [1, 2]
    assert [name.partition("-")[2] for name in place.saved("your_experiment")] == ["global_step2"]
    assert [row["lr"] for row in place.metrics("your_experiment")] == [3e-4, 3e-4]
    assert list(place.run("your_experiment").glob("wandb/*run*"))


def test_finetuning_begins(place: Workplace) -> None:
    """From Open-Sora v2, from FLUX in its fused-rope form, and from the launcher with a hostfile."""
    place.shell(f"{TRAIN} --model.from_pretrained ckpts/Open_Sora_v2.safetensors --exp-name open_sora")
    assert "0 missing" in place.log("open_sora") and place.steps("open_sora") == [1, 2]
    place.shell(f"{TRAIN} --model.from_pretrained ckpts/flux1-dev-fused-rope.safetensors --exp-name flux")
    assert "0 missing" in place.log("flux") and place.steps("flux") == [1, 2]
    said = place.shell(
        "colossalai run --hostfile hostfiles --nproc_per_node 8 --master_port 29519 scripts/diffusion/train.py "
        "configs/diffusion/train/stage1.py --dataset.data-path datasets/pexels_45k_necessary.csv "
        "--model.from_pretrained ckpts/Open_Sora_v2.safetensors --exp-name launched"
    )
    assert "127.0.0.1: success" in said and place.metrics("launched")[0]["loss"] == pytest.approx(
        place.metrics("open_sora")[0]["loss"]
    )


def test_training_goes_on(place: Workplace) -> None:
    """The pattern, unquoted as in the guide, means the newest checkpoint; data go on, or begin again where told."""
    load = "--load outputs/your_experiment/epoch*-global_step*"
    place.shell(f"{TRAIN} {load} --exp-name resumed --steps 3 --lr 3e-4 --ema-decay 0.9")
    assert place.steps("resumed") == [3] and place.saved("resumed")[-1].endswith("global_step3")
    options = "--start-step 0 --start-epoch 0 --exp-name restarted --steps 3 --lr 3e-4 --ema-decay 0.9"
    place.shell(f"{TRAIN} {load} {options}")
    assert place.steps("restarted") == [3] and place.metrics("restarted")[0]["epoch"] == 0


def test_shards_and_given_frames(place: Workplace) -> None:
    """A table that is read shard by shard, and the stage that continues images: both train."""
    place.shell(
        "torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1_i2v.py "
        "--dataset.data-path datasets/dataset --dataset.memory_efficient True "
        "--model.from_pretrained ckpts/Open_Sora_v2.safetensors --exp-name your_i2v_experiment"
    )
    assert place.steps("your_i2v_experiment") == [1, 2]
    assert {row["lr"] for row in place.metrics("your_i2v_experiment")} == {1e-5}


def test_settings_of_the_guide_are_read(place: Workplace) -> None:
    """The spellings in its snippets: buckets, checkpointing of blocks through a variable, the offload buffer."""
    (place.folder / "mine.py").write_text(
        '_base_ = ["configs/diffusion/train/stage1.py"]\n'
        "bucket_config = {\n"
        '    "_delete_": True,\n'
        '    "256px": {1: (1.0, 45), 33: (1.0, 12), 65: (1.0, 6), 97: (1.0, 4), 129: (1.0, 3)},\n'
        '    "768px": {1: (0.5, 13)},\n'
        '    "1024px": {1: (0.5, 7)},\n'
        "}\n"
        "grad_ckpt_setting = (100, 100)\n"
        "model = dict(\n    grad_ckpt_setting=grad_ckpt_setting,\n)\n"
        "grad_ckpt_buffer_size = 25 * 1024**3  # 25GB\n"
    )
    said = place.shell(
        "python scripts/diffusion/train.py mine.py --lr 1e-5 --dump --explain grad_ckpt_buffer_size --explain optim.lr "
        "--explain bucket_config.1024px.1 --explain model.grad_ckpt_settings"
    )
    assert "grad_ckpt_buffer_size = 26843545600" in said and "optim.lr = 1e-05  (--lr 1e-5)" in said
    assert "bucket_config.1024px.1 = (0.5, 7)" in said and "model.grad_ckpt_settings = (100, 100)" in said


def test_inference_of_a_trained_checkpoint(place: Workplace) -> None:
    """The command of the guide: FLUX draws an image, the trained model goes on from it."""
    place.shell(
        f'{SAMPLE}/t2i2v_256px.py --save-dir samples --prompt "raining, sea" '
        "--model.from_pretrained outputs/your_i2v_experiment/epoch*-global_step*"
    )
    info = probe(place.folder / "samples/prompt_0000.mp4")
    assert (info.num_frames, info.fps) == (5, 24.0)
    assert (place.folder / "samples/generated_condition/prompt_0000.png").is_file()


def test_inference_of_the_main_page(place: Workplace) -> None:
    """Several processes on one video; a csv with a language model and offloading; an image to go on from."""
    many = f'{SAMPLE}/t2i2v_768px.py --save-dir samples_768 --prompt "raining, sea"'
    place.shell(many.replace("--nproc_per_node 1", "--nproc_per_node 8"))
    assert probe(place.folder / "samples_768/prompt_0000.mp4").num_frames == 5
    (place.folder / "example.csv").write_text('text\n"raining, sea"\na cat\n')
    with serving(LanguageModel()) as url:
        place.shell(
            f"{SAMPLE}/256px.py --save-dir samples_csv --dataset.data-path example.csv --offload True "
            "--refine-prompt True --motion-score dynamic --num-sample 2 --seed 7",
            OPENAI_API_KEY="k",
            OPENAI_BASE_URL=f"{url}/v1",
        )
    made = {path.name for path in (place.folder / "samples_csv").glob("*.mp4")}
    assert made == {f"example_{row:04d}{k}.mp4" for row in (0, 1) for k in ("", "_1")}
    caption = (place.folder / "samples_csv/example_0001_1.txt").read_text()
    assert caption == "a cat, in full 24 FPS, 7 motion score.\n"
    place.shell(
        f'{SAMPLE}/256px.py --save-dir samples_i2v --cond_type i2v_head --prompt "a pig" '
        "--ref samples/generated_condition/prompt_0000.png --motion-score 4"
    )
    assert (place.folder / "samples_i2v/prompt_0000.mp4").is_file()


def test_weights_for_other_programs(place: Workplace) -> None:
    """A checkpoint becomes bfloat16 safetensors, from which sampling begins as well."""
    place.shell(f"python {ROOT}/tools/zero_to_bf16.py outputs/your_i2v_experiment exported")
    place.shell(f'{SAMPLE}/256px.py --save-dir samples_exported --prompt "raining, sea" --ckpt-path exported')
    assert (place.folder / "samples_exported/prompt_0000.mp4").is_file()
