"""Text to image to video: a tiny FLUX draws the first frame, once, before the video model is there."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import read_frames, read_image
from opensora_like.evaluation import sampling
from opensora_like.evaluation.first_image import image_size
from opensora_like.evaluation.sampling import build_sampling
from opensora_like.models.flux_image import FluxImage
from opensora_like.settings import InferenceConfig
from tests.stand_ins import save_flux
from tests.training.harness import ROOT, train_toy

CONFIG = ROOT / "tests/training/toy_inference.py"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a trained toy and a tiny FLUX without encoders."""
    folder = tmp_path_factory.mktemp("first_image")
    train_toy(folder, "--steps", "3")
    save_flux(folder / "flux", with_encoders=False)
    image = {"from_pretrained": str(folder / "flux"), "resolution": "64px", "num_steps": 2, "share_encoders": True}
    given = ["--ckpt-path", str(folder / "toy"), "--cond-type", "i2v_head", "--first-image.type", "flux_image"]
    return given + [word for key, value in image.items() for word in (f"--first-image.{key}", str(value))]


def run(ready: list[str], *arguments: str) -> list[Path]:
    config = read_config(CONFIG, [*ready, *arguments], schema=InferenceConfig).config
    return build_sampling(config, rt.start())()


def test_videos_go_on_from_their_images(ready: list[str], tmp_path: Path) -> None:
    """One image for each sample, different ones; the first frame of each video is its image, brought to the size."""
    paths = run(ready, "--prompt", "a cat", "--num-sample", "2", "--save-dir", str(tmp_path))
    images = [read_image(tmp_path / f"generated_condition/{path.stem}.png") for path in paths]
    assert images[0].shape == (1, 64, 64, 3) and not np.array_equal(*images)
    for path, image in zip(paths, images, strict=True):
        wanted = resize_crop(image, 16, 16, image=True)
        found = torch.from_numpy(read_frames(path, [0])).permute(3, 0, 1, 2) / 127.5 - 1
        assert (found - wanted).abs().mean() < 0.25 < (found.flip(-1) - wanted).abs().mean()
    record = json.loads((tmp_path / "prompt_0000_1.json").read_text())
    assert record["request"]["first_image"]["num_steps"] == 2


@pytest.mark.parametrize("offload", ["False", "True"])
def test_flux_is_gone_before_the_video_model_comes(ready: list[str], tmp_path: Path, offload: str) -> None:
    """When the weights of the video model are in memory, none of FLUX's are, and the images are on disk."""
    arguments = ["--prompt", "a cat", "--save-dir", str(tmp_path), "--offload", offload]
    sample = build_sampling(read_config(CONFIG, [*ready, *arguments], schema=InferenceConfig).config, rt.start())
    kinds = [type(o).__name__ for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]
    assert "MMDiT" in kinds and "FluxTransformer2DModel" not in kinds and "AutoencoderKL" not in kinds
    assert (tmp_path / "generated_condition/prompt_0000.png").is_file() and len(sample()) == 1


def test_images_are_kept_and_reproducible(ready: list[str], tmp_path: Path) -> None:
    """A resumed run reads the image of the killed one, without FLUX; a fresh one draws the same; offload, too."""
    (path,) = run(ready, "--prompt", "a cat", "--save-dir", str(tmp_path / "a"))
    pixels = path.read_bytes()
    path.unlink()
    away = ["--first-image.from-pretrained", "nowhere", "--save-dir", str(tmp_path / "a"), "--prompt", "a cat"]
    with pytest.raises(FileNotFoundError, match=r"first_image.from_pretrained='nowhere' has no model_index.json"):
        run(ready, *away)  # asked for with other settings, so its image is not this one's
    assert run(ready, "--prompt", "a cat", "--save-dir", str(tmp_path / "a")) == [path]
    assert path.read_bytes() == pixels
    (again,) = run(ready, "--prompt", "a cat", "--save-dir", str(tmp_path / "b"), "--offload", "True")
    assert again.read_bytes() == pixels
    flux = Path(ready[ready.index("--first-image.from_pretrained") + 1])
    path.unlink()
    flux.rename(flux.with_name("away"))
    try:
        assert run(ready, "--prompt", "a cat", "--save-dir", str(tmp_path / "a")) == [path]
    finally:
        flux.with_name("away").rename(flux)


def test_rows_with_a_reference_keep_it(ready: list[str], tmp_path: Path) -> None:
    """An image is drawn only where none is given."""
    first = run(ready, "--prompt", "a cat", "--save-dir", str(tmp_path / "a"))[0]
    shutil.copyfile(tmp_path / "a/generated_condition/prompt_0000.png", tmp_path / "own.png")
    (tmp_path / "p.csv").write_text("text,ref\na cat,own.png\na dog,\n")
    paths = run(ready, "--prompts", str(tmp_path / "p.csv"), "--save-dir", str(tmp_path / "b"))
    assert [p.name for p in sorted((tmp_path / "b/generated_condition").iterdir())] == ["p_0001.png"]
    assert paths[0].read_bytes() == first.read_bytes()


def test_the_pipelines_own_encoders(tmp_path: Path) -> None:
    """A whole pipeline draws from the text; another text gives another image, the same generator the same one."""
    save_flux(tmp_path / "flux", with_encoders=True)
    drawer = FluxImage(str(tmp_path / "flux"), num_steps=2)
    drawer.load(torch.device("cpu"), torch.float32, offload=True)

    def draw(text: str) -> np.ndarray:
        return drawer.draw(text, (32, 48), generator=torch.Generator().manual_seed(0))

    cat, dog = draw("a cat"), draw("a dog")
    assert cat.shape == (32, 48, 3) and cat.dtype == np.uint8
    assert np.array_equal(cat, draw("a cat")) and not np.array_equal(cat, dog)


def test_sizes_are_the_published_ones() -> None:
    """768px at the ratio nearest to the video's."""
    assert image_size("768px", (192, 336)) == image_size("768px", (576, 1024)) == (576, 1024)
    assert image_size("768px", (16, 16)) == (768, 768)


def test_mistakes_are_named(ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that has no use for an image, another pipeline, encoders that are not there, a misspelt argument."""
    common = ["--prompt", "a cat", "--save-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="first_image draws one image, which cond_type='t2v' does not go on from"):
        run(ready, *common, "--cond-type", "t2v")
    with pytest.raises(ValueError, match=r"first_image.num_step: .*did you mean \['num_steps'\]"):
        run(ready, *common, "--first-image.num-step", "3")
    with pytest.raises(ValueError, match=r"first_image.num_steps=0 must be 1 or more"):
        run(ready, *common, "--first-image.num-steps", "0")
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"first_image.resolution='big': "):
        patched.setattr(sampling, "build_frozen", None)  # which would load the encoders
        run(ready, *common, "--first-image.resolution", "big")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="holds a WanPipeline, not a FluxPipeline"):
        run(ready, *common, "--first-image.from-pretrained", str(tmp_path))


@pytest.mark.parametrize(("name", "resolution"), [("t2i2v_256px", "256px"), ("t2i2v_768px", "768px")])
def test_shipped_configs_have_the_published_values(name: str, resolution: str) -> None:
    """129 frames in 50 steps, guidance 7.5 and 3, motion score 4 at 24 frames per second; FLUX at 768px with 4."""
    path = ROOT / f"configs/diffusion/inference/{name}.py"
    config = read_config(path, ["--prompt", "raining, sea"], schema=InferenceConfig).config
    assert (config.resolution, config.aspect_ratio, config.num_frames) == (resolution, "16:9", 129)
    assert (config.num_steps, config.guidance, config.guidance_img) == (50, 7.5, 3.0)
    assert config.text_osci and config.image_osci and config.scale_temporal_osci
    assert (config.cond_type, config.motion_score, config.fps_save, config.seed) == ("i2v_head", 4.0, 24, 42)
    image = config.first_image
    assert (image["resolution"], image["num_steps"], image["guidance"], image["share_encoders"]) == (
        "768px",
        50,
        4.0,
        True,
    )


def test_only_the_many_tokens_of_768px_are_shared() -> None:
    """The published high_compression takes back the sequence parallelism of t2i2v_768px, its base."""
    for name, sp_size in (("t2i2v_256px", 1), ("t2i2v_768px", "all"), ("high_compression", 1)):
        path = ROOT / f"configs/diffusion/inference/{name}.py"
        assert read_config(path, ["--prompt", "a"], schema=InferenceConfig).config.sp_size == sp_size
