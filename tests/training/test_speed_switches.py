"""What makes a run faster leaves its numbers alone: garbage, compilation, and batches that wait on the device."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.autoencoders.dc_ae import DCAE
from opensora_like.models.autoencoders.hunyuan_vae import HunyuanVAE
from opensora_like.models.autoencoders.patch import PatchAutoencoder
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.mmdit.model import MMDiT
from opensora_like.training.compilation import compile_autoencoder, compile_blocks
from opensora_like.training.device_feed import DeviceFeed
from tests.training.harness import tensors_of, train_toy

AUTOENCODERS = {
    "hunyuan": lambda: HunyuanVAE(
        latent_channels=4, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 4, 8, 8)
    ),
    "dc_ae": lambda: DCAE("dc-ae-f4t4c8"),
    "wan": lambda: WanVAE(tiny={}),
}


@pytest.fixture(autouse=True)
def forget_compilations():
    yield
    torch._dynamo.reset()
    counters.clear()


def test_garbage_is_collected_when_it_was_asked_for(tmp_path: Path) -> None:
    """After every third update and at no other time; the run is the same in every bit, and Python's way comes back."""
    plain = tensors_of(train_toy(tmp_path / "a", "--steps", "7"))
    collected: list[int] = []

    def heard(phase: str, facts: dict[str, int]) -> None:
        if phase == "start":
            collected.append(facts["generation"])

    gc.callbacks.append(heard)
    try:
        run = train_toy(tmp_path / "b", "--steps", "7", "--gc-every", "3")
        during = collected.count(2)
    finally:
        gc.callbacks.remove(heard)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert during >= 2
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors_of(run).items())


@pytest.mark.parametrize("booster", ["ddp", "fsdp2", "colossalai"])
def test_compiled_blocks_train_to_the_same_weights(tmp_path: Path, booster: str) -> None:
    """Graphs are made, names stay, and four updates end within float32's rounding; with recomputation, too."""
    arguments = ["--steps", "4", "--booster.type", booster, "--grad-ckpt-settings", "(1, 1)"]
    plain = tensors_of(train_toy(tmp_path / "a", *arguments))
    assert not counters["stats"]["unique_graphs"]
    compiled = tensors_of(train_toy(tmp_path / "b", *arguments, "--compile-blocks", "aot_eager"))
    assert counters["stats"]["unique_graphs"] >= 2
    assert compiled.keys() == plain.keys()
    for name, tensor in compiled.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-5, rtol=1e-4)


@torch._dynamo.config.patch(recompile_limit=8)  # torch's own
def test_every_bucket_runs_compiled() -> None:
    """Batches of several sizes and lengths, with gradients and, as in validation, without."""
    sizes = {"in_channels": 4, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 32, "num_heads": 2}
    model = MMDiT(**sizes, depth=2, depth_single_blocks=0, axes_dim=(4, 6, 6), patch_size=1)
    compile_blocks(model, "eager")
    for with_gradients in (True, False):
        for shape in ((2, 4, 3, 4, 4), (2, 4, 5, 4, 6), (1, 4, 9, 6, 4), (4, 4, 1, 8, 8)):
            conditions = {"text": torch.zeros(shape[0], 5, 8), "pooled": torch.zeros(shape[0], 8)}
            with torch.set_grad_enabled(with_gradients):
                model(torch.zeros(shape), torch.full((shape[0],), 0.5), conditions)
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 0


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_compiled_autoencoder_is_really_compiled(name: str) -> None:
    """Encoding and decoding run through graphs, give the same numbers, and weights keep their names."""
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS[name]().eval()
    stride = autoencoder.spatial_stride
    video = torch.rand(1, 3, 5 if autoencoder.is_causal else 8, 2 * stride, 2 * stride) * 2 - 1
    names = list(autoencoder.state_dict())
    with torch.no_grad():
        latents = autoencoder.encode(video)
        pixels = autoencoder.decode(latents)
        compile_autoencoder(autoencoder, "aot_eager")
        torch.testing.assert_close(autoencoder.encode(video), latents, atol=1e-5, rtol=1e-5)
        after_encoding = counters["stats"]["unique_graphs"]
        torch.testing.assert_close(autoencoder.decode(latents), pixels, atol=1e-5, rtol=1e-5)
    assert 0 < after_encoding < counters["stats"]["unique_graphs"]
    assert list(autoencoder.state_dict()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile-blocks", "inducter"], "compile_blocks='inducter'.*inductor"),
        (["--compile-autoencoder", "eager"], "PatchAutoencoder has no encoder and decoder to compile"),
        (["--gc-every", "-1"], "gc_every=-1 must be"),
        (["--device-prefetch", "True"], "device_prefetch=True needs a GPU"),
        (["--pin-memory", "True"], "pin_memory=True needs a GPU"),
    ],
)
def test_a_switch_that_would_do_nothing_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    """With the setting and the remedy."""
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        train_toy(tmp_path, "--steps", "1", *arguments)


def test_the_exact_autoencoder_has_nothing_to_compile() -> None:
    """It has no networks."""
    with pytest.raises(ValueError, match="PatchAutoencoder has no encoder and decoder"):
        compile_autoencoder(PatchAutoencoder(), "eager")


def make_batch(index: int) -> Batch:
    shape = BucketShape("1px", 1, 1, 1)
    return Batch(0, index, shape, [index], [""], [""], video_BCTHW=torch.full((1,), float(index)))


def test_batches_come_in_order_and_an_error_in_its_turn() -> None:
    """One batch is fetched ahead; what the loader raises is raised where that batch would have come."""

    def loader():
        for index in range(3):
            yield make_batch(index)
        raise ValueError("no spare left")

    feed = DeviceFeed(loader(), torch.device("cpu"))
    found = [next(feed).video_BCTHW.item() for _ in range(3)]
    assert found == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="no spare left"):
        next(feed)
    assert [b.index for b in DeviceFeed(iter([make_batch(0), make_batch(1)]), torch.device("cpu"))] == [0, 1]
