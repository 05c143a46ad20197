"""Sampling Wan 2.2 gives what diffusers' pipelines give: two experts, each with its own guidance and adapters; TI2V."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_like.config import read_config
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.experts import ExpertSettings, taking_turns
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.settings import InferenceConfig
from tests.evaluation.test_wan_pipeline import PROMPT, SIDE, make, noise_of, pipeline_of
from tests.wan_stand_in import write_pipeline, write_transformer

CONFIGS = Path(__file__).parents[2] / "configs/diffusion/inference"
STEPS, FRAMES, NEGATIVE = 5, 5, "circle"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with two experts, and one with the small model of Wan 2.2 and its autoencoder."""
    from diffusers import AutoencoderKLWan

    from opensora_like.models.autoencoders.wan_vae_versions import VERSIONS

    folder = write_pipeline(tmp_path_factory.mktemp("wan"))
    torch.manual_seed(5)
    write_transformer(folder / "transformer_2")
    write_transformer(folder / "small/transformer", in_channels=48, out_channels=48)
    sizes = {**VERSIONS["2.2"], "base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
    AutoencoderKLWan(**sizes).save_pretrained(folder / "small/vae")
    return folder


def generator_of(name: str, folder: Path, *arguments: str) -> VideoGenerator:
    """A shipped config with tiny weights."""
    home = folder / "small" if "5b" in name else folder
    side = str(SIDE if "5b" not in name else 2 * SIDE)
    tiny = ["--model.variant", "none", "--model.config", str(home), "--model.from_pretrained"]
    tiny += [str(home / "transformer"), "--autoencoder.from_pretrained", str(home / "vae")]
    tiny += ["--encoders.text.from_pretrained", str(folder), "--encoders.text.dtype", "fp32", "--dtype", "fp32"]
    tiny += ["--height", side, "--width", side, "--num-frames", str(FRAMES), "--num-steps", str(STEPS)]
    if "5b" not in name:
        tiny += ["--other-expert.from-pretrained", str(folder / "transformer_2")]
    config = read_config(CONFIGS / name, [*tiny, "--prompt", PROMPT, *arguments], schema=InferenceConfig).config
    return VideoGenerator(config, torch.device("cpu"))


@pytest.mark.parametrize("offload", ["False", "True"])
def test_two_experts_are_those_of_the_pipeline(published: Path, offload: str) -> None:
    """transformer from the boundary up, transformer_2 below, a scale for each; wherever the idle one waits."""
    from diffusers import WanTransformer3DModel

    arguments = ["--negative-prompt", NEGATIVE, "--offload", offload]
    generator = generator_of("wan2_2_t2v_a14b.py", published, *arguments)
    latents, _ = make(generator)
    pipe = pipeline_of(published, "unipc", 12.0)
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_pretrained(published / "transformer_2"))
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": SIDE, "width": SIDE, "num_frames": FRAMES}
    call |= {"num_inference_steps": STEPS, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    expected = pipe(**call, latents=noise_of(generator), output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    alone = generator_of("wan2_2_t2v_a14b.py", published, *arguments, "--other-expert", "none")
    assert (make(alone)[0] - latents).abs().max() > 1e-2, "both experts have to count"


def test_either_expert_can_be_the_main_one(published: Path) -> None:
    """The low-noise expert with the high-noise one beside it makes the same video."""
    first = generator_of("wan2_2_t2v_a14b.py", published, "--guidance", "3.0")
    arguments = ["--model.from_pretrained", str(published / "transformer_2"), "--other-expert.noise", "high"]
    arguments += ["--other-expert.from-pretrained", str(published / "transformer"), "--guidance", "3.0"]
    second = generator_of("wan2_2_t2v_a14b.py", published, *arguments)
    assert torch.equal(make(first)[0], make(second)[0])


def test_each_expert_has_its_own_adapters(published: Path, tmp_path: Path) -> None:
    """A file of kohya's names, with alpha and a strength, on the low-noise expert: as if merged into its weights."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(published / "transformer_2")
    linear = theirs.get_submodule("blocks.1.attn1.to_q")
    down, up = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
    key = "lora_unet__blocks_1_self_attn_q"
    adapter = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(adapter, tmp_path / "lora.safetensors")
    linear.weight.data += 0.7 * 0.5 * up @ down
    theirs.save_pretrained(tmp_path / "merged")
    arguments = ["--other-expert.lora-checkpoint", str(tmp_path / "lora.safetensors")]
    arguments += ["--other-expert.lora-scale", "0.7"]
    found = generator_of("wan2_2_t2v_a14b.py", published, *arguments)
    merged = ["--other-expert.from-pretrained", str(tmp_path / "merged")]
    expected = generator_of("wan2_2_t2v_a14b.py", published, *merged)
    torch.testing.assert_close(make(found)[0], make(expected)[0], atol=1e-4, rtol=0)
    assert (make(found)[0] - make(generator_of("wan2_2_t2v_a14b.py", published))[0]).abs().max() > 1e-3


def test_the_boundary_itself_is_high_noise() -> None:
    """In float32, too, where 0.9 is a little less."""
    low = ExpertSettings(boundary=0.9)
    times = [1.0, torch.tensor(0.9).item(), 0.899, 0.0]
    assert [low.makes(t) for t in times] == [False, False, True, True]
    high = ExpertSettings(boundary=0.9, noise="high")
    assert [high.makes(t) for t in times] == [True, True, False, False]


def test_with_offload_one_expert_at_a_time_is_on_the_device(published: Path) -> None:
    """The idle one waits on the CPU, and both do at the end; meta stands for a device."""
    generator = generator_of("wan2_2_t2v_a14b.py", published, "--offload", "True")
    device, own, other = torch.device("meta"), torch.nn.Linear(1, 1), generator._other
    other = type(other)(other.settings, torch.nn.Linear(1, 1))
    seen = []

    def velocity(x, t_B, step):
        seen.append((own.weight.device.type, other.model.weight.device.type))
        return x

    own.to = lambda where: setattr(own, "weight", torch.nn.Parameter(torch.ones(1, 1, device=where)))
    other.model.to = lambda where: setattr(other.model, "weight", torch.nn.Parameter(torch.ones(1, 1, device=where)))
    with taking_turns(own, other, device, offload=True) as switch:
        joined = switch(velocity, lambda expert: velocity)
        for t in (1.0, 0.9, 0.5):
            joined(torch.ones(1), torch.tensor([t]), 0)
    assert seen == [("meta", "cpu"), ("meta", "cpu"), ("cpu", "meta")]
    assert own.weight.device.type == other.model.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--other-expert", "{'boundary': 0.9}"], "has no weights"),
        (["--other-expert", "{'from_pretrained': 'x'}"], r"needs \['boundary'\]"),
        (["--other-expert.boundary", "900.0"], "boundary=900.0 must be between 0 and 1"),
        (["--other-expert.noise", "'lower'"], "noise"),
        (["--other-expert.guidence", "3.0"], "did you mean .*guidance"),
    ],
)
def test_mistakes_are_named(published: Path, arguments: list[str], message: str) -> None:
    """In the section other_expert."""
    with pytest.raises(ValueError, match=message):
        generator_of("wan2_2_t2v_a14b.py", published, *arguments)


@pytest.mark.parametrize("task", ["t2v", "i2v_head"])
def test_the_small_model_is_that_of_the_pipeline(published: Path, tmp_path: Path, task: str) -> None:
    """Latents of 48 channels; with a first frame given, its tokens told t = 0 in every step, it comes back as given."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from PIL import Image
    from transformers import AutoTokenizer, UMT5EncoderModel

    side, small, arguments = 2 * SIDE, published / "small", []
    drawn = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    write_image(tmp_path / "first.png", drawn)
    if task != "t2v":
        arguments = ["--cond-type", task, "--ref", str(tmp_path / "first.png")]
    generator = generator_of("wan2_2_ti2v_5b.py", published, *arguments)
    latents, _ = make(generator)
    vae = AutoencoderKLWan.from_pretrained(small / "vae")
    transformer = WanTransformer3DModel.from_pretrained(small / "transformer")
    texts = generator.encoders["text"].encode([PROMPT, ""])
    call = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:], "latents": noise_of(generator)}
    call |= {"height": side, "width": side, "num_frames": FRAMES, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    parts = {"tokenizer": AutoTokenizer.from_pretrained(published / "tokenizer"), "vae": vae}
    parts |= {"text_encoder": UMT5EncoderModel.from_pretrained(published / "text_encoder")}
    parts |= {"scheduler": UniPCMultistepScheduler(**flow), "transformer": transformer}
    if task == "t2v":
        from diffusers import WanPipeline

        pipe = WanPipeline(**parts, expand_timesteps=True)
    else:
        pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        call["image"] = Image.open(tmp_path / "first.png")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**call, output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=0)
