"""Sampling HunyuanVideo gives what diffusers' pipelines give with the same weights, noise and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.config import read_config
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import read_image
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.jobs import jobs_of
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.settings import InferenceConfig
from tests.evaluation.test_wan_pipeline import make
from tests.hunyuan_stand_in import TRANSFORMER, VAE, WIDTH, write_pipeline

CONFIGS = Path(__file__).parents[2] / "configs/diffusion/inference"
PROMPT, NEGATIVE = "a red circle moving left", "blue"
STEPS, FRAMES, SIDE = 4, 9, 32


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("hunyuan"), i2v=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("hunyuan_i2v"), i2v=True)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    drawn = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    write_image(tmp_path / "first.png", drawn)
    return tmp_path / "first.png"


def generator_of(kind: str, folder: Path, *arguments: str) -> VideoGenerator:
    """A shipped config with the tiny weights of `folder`; nothing is tiled."""
    sizes = {**TRANSFORMER, "text_dim": WIDTH, "pooled_dim": WIDTH, "token_replace": kind == "i2v"}
    tiny = ["--model.variant", "none", "--model.from_pretrained", str(folder)]
    for section, values in (
        ("model", sizes),
        ("autoencoder", {**VAE, "from_pretrained": str(folder), "dtype": "fp32"}),
    ):
        for name, value in values.items():
            tiny += [f"--{section}.{name}", str(value)]
    tiny += ["--autoencoder.use_spatial_tiling", "False", "--autoencoder.use_temporal_tiling", "False"]
    for encoder in ("text", "pooled"):
        tiny += [f"--encoders.{encoder}.from_pretrained", str(folder), f"--encoders.{encoder}.dtype", "fp32"]
    tiny += ["--resolution", "none", "--height", str(SIDE), "--width", str(SIDE), "--num-frames", str(FRAMES)]
    tiny += ["--num-steps", str(STEPS), "--dtype", "fp32", "--prompt", PROMPT]
    config = read_config(CONFIGS / f"hunyuan_video_{kind}.py", [*tiny, *arguments], schema=InferenceConfig).config
    return VideoGenerator(config, torch.device("cpu"))


def call_of(generator: VideoGenerator) -> dict:
    """Arguments of a pipeline for the same sample."""
    (job,) = jobs_of(read_prompts(generator.cfg), 1)
    cfg = generator.cfg
    call = {"prompt": PROMPT, "height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": STEPS}
    return call | {"guidance_scale": cfg.distilled_guidance, "latents": generator._noise(job)[None]}


def pipeline_of(kind: str, folder: Path):
    import diffusers
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModel, LlamaModel, LlavaForConditionalGeneration

    parts = {
        "transformer": diffusers.HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer"),
        "vae": diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae"),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        "text_encoder_2": CLIPTextModel.from_pretrained(folder / "text_encoder_2"),
    }
    if kind == "t2v":
        text_encoder = LlamaModel.from_pretrained(folder / "text_encoder")
        pipe = diffusers.HunyuanVideoPipeline(text_encoder=text_encoder, **parts)
    else:
        pipe = diffusers.HunyuanVideoImageToVideoPipeline(
            text_encoder=LlavaForConditionalGeneration.from_pretrained(folder / "text_encoder"),
            image_processor=CLIPImageProcessor.from_pretrained(folder / "image_processor"),
            **parts,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_text_to_video_is_that_of_the_pipeline(t2v: Path, scale: float) -> None:
    """Guidance as an input, and beside it that of a negative prompt: latents and pixels to 1e-4."""
    generator = generator_of("t2v", t2v, "--guidance", str(scale), "--negative-prompt", NEGATIVE)
    latents, video = make(generator)
    pipe, call = pipeline_of("t2v", t2v), call_of(generator)
    call |= {"negative_prompt": NEGATIVE, "true_cfg_scale": scale}
    expected = pipe(**call, output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert (expected - call["latents"]).abs().max() > 0.1, "the model has to move something"
    pixels = pipe(**call, output_type="pt").frames[0].transpose(0, 1)
    torch.testing.assert_close(video / 2 + 0.5, pixels, atol=1e-4, rtol=0)


def test_image_to_video_is_that_of_the_pipeline(i2v: Path, picture: Path) -> None:
    """LLaVA's tokens, the trace of the image in the noise and the kept first frame included: latents to 1e-4."""
    from PIL import Image

    generator = generator_of("i2v", i2v, "--ref", str(picture))
    latents, video = make(generator)
    image = Image.open(picture)
    expected = pipeline_of("i2v", i2v)(image=image, **call_of(generator), output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert video.shape == (3, FRAMES, SIDE, SIDE)
    first = resize_crop(read_image(picture), SIDE, SIDE, image=True)
    torch.testing.assert_close(latents[:, :, :1], generator.autoencoder.encode(first[None]), atol=1e-5, rtol=0)


def test_prompt_image_and_guidance_count(i2v: Path, picture: Path, tmp_path: Path) -> None:
    """Another of each gives other frames behind the first; so does guidance by the negative prompt or the image."""
    plain, _ = make(generator_of("i2v", i2v, "--ref", str(picture)))
    write_image(tmp_path / "other.png", torch.full((SIDE, SIDE, 3), 200, dtype=torch.uint8))
    for arguments in (
        ["--prompt", "a blue square"],
        ["--ref", str(tmp_path / "other.png")],
        ["--distilled-guidance", "1"],
        ["--guidance", "3"],
        ["--guidance-img", "2"],
    ):
        other, _ = make(generator_of("i2v", i2v, "--ref", str(picture), *arguments))
        assert (other - plain)[:, :, 1:].abs().max() > 1e-3, arguments


def test_without_a_reference_or_with_another_task_it_says_so(i2v: Path, t2v: Path, picture: Path) -> None:
    """A missing image, a last frame that is given, an image for a model that takes none."""
    with pytest.raises(ValueError, match="has no reference"):
        make(generator_of("i2v", i2v))
    with pytest.raises(ValueError, match=r"takes \['i2v_head', 't2v'\] only"):
        generator_of("i2v", i2v, "--cond-type", "i2v_tail", "--ref", str(picture))
    with pytest.raises(ValueError, match="cond_type='i2v_head'"):
        generator_of("t2v", t2v, "--cond-type", "i2v_head", "--ref", str(picture))
