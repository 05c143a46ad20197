"""From a batch of pixels to the loss, our own classes give what the published training script gave."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora_like.conditioning.encode import Encode
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.tokens import patchify, position_ids, unpatchify
from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.training.step import FlowMatchingStep
from tests.conditioning.test_masks import ToyAutoencoder

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "opensora_train_a.safetensors")
CASES = json.loads((GOLDEN / "opensora_train_a.json").read_text())["cases"]
CPU = torch.device("cpu")


class Recorded:
    """An encoder that knows its answers: of the samples by number, and of the empty caption.

    The published null embedding may be shorter than the captions; its last token is then repeated.
    """

    def __init__(self, known: Tensor, null: Tensor) -> None:
        missing = known.shape[1] - null.shape[1] if known.ndim == 3 else 0
        self.known, self.null = known, torch.cat([null, *[null[:, -1:]] * missing], dim=1)

    def encode(self, texts: list[str]) -> Tensor:
        return torch.cat([self.known[int(text)][None] if text else self.null for text in texts])


class HalfTanh:
    """The toy model of the recorded loss, in latents."""

    def __call__(self, x: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x) * 0.5


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("dropped", [False, True])
def test_inputs_and_loss_are_the_recorded_ones(number: int, dropped: bool) -> None:
    """Latents, given frames, captions kept and dropped, guidance, positions, noisy latents and the loss."""
    case = CASES[number]
    given, inp = (
        {n.split("/")[-1]: t for n, t in TENSORS.items() if n.startswith(f"{number}/{part}/")}
        for part in ("given", "inp")
    )
    patch, count = case["patch"], len(given["video"])
    encoders = {
        name: Recorded(given[a], given[b])
        for name, a, b in (("text", "t5", "null_txt"), ("pooled", "clip", "null_vec"))
    }
    names = {"text", "pooled", "guidance"} | ({"visual"} if "cond" in case else set())
    encode = Encode(
        SimpleNamespace(condition_names=frozenset(names)),
        ToyAutoencoder(is_causal=case["causal"], temporal_stride=case["tc"], mix=given["mix"]),
        encoders,
        seed=0,
        device=CPU,
        dropout_ratio={name: float(dropped) for name in encoders},
        condition_config={"i2v_head": 1.0} if "cond" in case else None,  # what was drawn for all of them
        guidance=case.get("guidance", 4),
        sample_posterior=False,
    )
    rows = list(range(count))
    shape, texts = BucketShape("8px", *given["video"].shape[2:]), [str(row) for row in rows]
    inputs = encode(Batch(0, 0, shape, rows, texts, texts, video_BCTHW=given["video"]))
    size = dict(zip(("num_frames", "height", "width"), inputs.x0_BCTHW.shape[2:], strict=True))

    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(patchify(inputs.x0_BCTHW, patch), TENSORS[f"{number}/x_0"], **close)
    torch.testing.assert_close(inputs.conditions["guidance"], inp["guidance"], **close)
    if "cond" in case:
        torch.testing.assert_close(patchify(inputs.conditions["visual"], patch), inp["cond"], **close)
    for place, (name, wanted) in enumerate((("text", "txt"), ("pooled", "y_vec"))):
        drew = TENSORS.get(f"{number}/draw/{place + 1}_rand")
        is_dropped = torch.zeros(count) if "dropout" not in case else drew < case["dropout"][("t5", "clip")[place]]
        same = is_dropped.bool() == dropped
        torch.testing.assert_close(inputs.conditions[name][same], inp[wanted][same], **close)
    ids_LA = position_ids(size["num_frames"], size["height"] // patch, size["width"] // patch)
    assert torch.equal(ids_LA.expand(count, -1, -1), inp["img_ids"].long())

    step = FlowMatchingStep(HalfTanh(), encode, flow := FlowMatching(shift="resolution"), seed=0, dtype=torch.float32)
    noise = unpatchify(TENSORS[f"{number}/x_1"], patch, **size)
    noisy = flow.add_noise(inputs.x0_BCTHW, noise, inp["timesteps"])
    torch.testing.assert_close(patchify(noisy, patch), inp["img"], **close)
    loss = step.errors(inputs, noise, inp["timesteps"]).mean().item()
    assert loss == pytest.approx(case["loss_of_half_tanh"], abs=1e-5)
