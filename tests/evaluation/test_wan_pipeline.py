"""Sampling Wan gives what diffusers' WanPipeline gives with the same weights, noise and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_like.config import read_config
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.jobs import jobs_of
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.models.image_encoders import CLIPImageEncoder
from opensora_like.settings import InferenceConfig
from tests.wan_stand_in import I2V, write_pipeline, write_transformer

CONFIG = Path(__file__).parents[2] / "configs/diffusion/inference/wan2_1_t2v_1_3b.py"
PROMPT, NEGATIVE = "  a red &amp; round circle ", "circle"
STEPS, FRAMES, SIDE = 6, 9, 32


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with tiny random weights, in the layout of the published ones."""
    folder = write_pipeline(tmp_path_factory.mktemp("wan"))
    write_transformer(folder / "i2v/transformer", **I2V)
    seer = CLIPImageEncoder(tiny={}, dtype="fp32")
    seer.model.save_pretrained(folder / "i2v/image_encoder")
    seer._prepare.save_pretrained(folder / "i2v/image_processor")
    return folder


def pipeline_of(folder: Path, sampler: str, shift: float):
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5EncoderModel

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    unipc = sampler == "unipc"
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=UniPCMultistepScheduler(**flow) if unipc else FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator_of(folder: Path, *arguments: str) -> VideoGenerator:
    """The shipped config with the tiny weights."""
    tiny = ["--model.variant", "none", "--model.config", str(folder), "--model.from_pretrained"]
    tiny += [str(folder / "transformer"), "--autoencoder.from_pretrained", str(folder / "vae")]
    tiny += ["--encoders.text.from_pretrained", str(folder), "--encoders.text.dtype", "fp32", "--dtype", "fp32"]
    tiny += ["--height", str(SIDE), "--width", str(SIDE), "--num-frames", str(FRAMES), "--num-steps", str(STEPS)]
    config = read_config(CONFIG, [*tiny, *arguments], schema=InferenceConfig).config
    return VideoGenerator(config, torch.device("cpu"))


def make(generator: VideoGenerator) -> tuple[Tensor, Tensor]:
    """Returns: the latents that were decoded, and the pixels in [-1, 1]."""
    decoded = []
    inner = generator.autoencoder.decode

    def decode(z: Tensor) -> Tensor:
        decoded.append(z)
        return inner(z)

    generator.autoencoder.decode = decode
    (made,) = generator.sample(read_prompts(generator.cfg))
    return decoded[0], made.video_CTHW


def noise_of(generator: VideoGenerator) -> Tensor:
    """What sampling begins with, which the pipeline is given."""
    (job,) = jobs_of(read_prompts(generator.cfg), 1)
    return generator._noise(job)[None]


@pytest.mark.parametrize(("sampler", "shift"), [("unipc", 3.0), ("unipc", 5.0), ("euler", 3.0)])
def test_latents_and_pixels_are_those_of_the_pipeline(published: Path, sampler: str, shift: float) -> None:
    """Guided by a negative prompt, six steps, 1e-4: latents and decoded video."""
    arguments = ["--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--sampler", sampler]
    generator = generator_of(published, *arguments, "--scheduler.shift", str(shift))
    latents, video = make(generator)
    noise = noise_of(generator)
    pipe = pipeline_of(published, sampler, shift)
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": SIDE, "width": SIDE, "num_frames": FRAMES}
    call |= {"num_inference_steps": STEPS, "guidance_scale": generator.cfg.guidance, "latents": noise}
    expected = pipe(**call, output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert (expected - noise).abs().max() > 0.1, "the model has to move something"
    pixels = pipe(**call, output_type="pt").frames[0].transpose(0, 1)
    torch.testing.assert_close(video / 2 + 0.5, pixels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["i2v_head", "i2v_loop"])
def test_image_to_video_is_that_of_the_pipeline(published: Path, tmp_path: Path, task: str) -> None:
    """From a first frame, and from a first and a last: latents to 1e-4, the grey clip and CLIP's tokens included."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

    drawn = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    paths = [tmp_path / "first.png", tmp_path / "last.png"]
    for path, pixels in zip(paths, drawn, strict=True):
        write_image(path, pixels)
    refs = paths if task == "i2v_loop" else paths[:1]
    i2v = published / "i2v"
    arguments = ["--model.config", str(i2v), "--model.from_pretrained", str(i2v / "transformer"), "--prompt", PROMPT]
    arguments += ["--encoders.image_embeds", str({"type": "clip_vision", "from_pretrained": str(i2v), "dtype": "fp32"})]
    arguments += ["--cond-type", task, "--ref", ";".join(map(str, refs)), "--guidance-img", "1"]
    generator = generator_of(published, *arguments)
    latents, _ = make(generator)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(published / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(published / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(published / "vae"),
        scheduler=UniPCMultistepScheduler(**flow),
        image_processor=CLIPImageProcessor.from_pretrained(i2v / "image_processor"),
        image_encoder=CLIPVisionModel.from_pretrained(i2v / "image_encoder"),
        transformer=WanTransformer3DModel.from_pretrained(i2v / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(path) for path in refs]
    texts = generator.encoders["text"].encode([PROMPT, ""])  # this pipeline cleans text only where ftfy is installed
    call = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:]}
    call |= {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
    call |= {"num_inference_steps": STEPS, "guidance_scale": generator.cfg.guidance, "latents": noise_of(generator)}
    if task == "i2v_loop":  # models for first and last frame take the tokens of both, this one those of the first
        embeds = pipe.encode_image(images[0], "cpu")
        pipe.encode_image = lambda image, device: embeds
    last = {"last_image": images[1]} if task == "i2v_loop" else {}
    expected = pipe(image=images[0], **last, **call, output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_the_prompt_and_the_negative_one_count(published: Path) -> None:
    """Other texts give other latents, so that the equality above says something about both."""
    plain, _ = make(generator_of(published, "--prompt", PROMPT))
    for arguments in (["--prompt", "red red"], ["--prompt", PROMPT, "--negative-prompt", NEGATIVE]):
        other, _ = make(generator_of(published, *arguments))
        assert (other - plain).abs().max() > 1e-3


def test_an_even_grid_is_another_one(published: Path) -> None:
    """time_grid="diffusers" is what makes the results equal; the even grid ends elsewhere."""
    there, _ = make(generator_of(published, "--prompt", PROMPT))
    here, _ = make(generator_of(published, "--prompt", PROMPT, "--time-grid", "even"))
    assert (there - here).abs().max() > 1e-3
