"""Training a model that keeps given tokens: what stands in a given frame reaches neither its input nor its loss."""

from __future__ import annotations

from pathlib import Path

import torch

from opensora_like.training.trainer import train
from tests.training.harness import build_toy
from tools.zero_to_bf16 import prepare

MODEL = {
    "type": "wan",
    "token_replace": True,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "num_layers": 1,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "text_length": 16,
}
TEXT = {"type": "t5", "max_length": 16, "dtype": "fp32"}
TEXT["tiny"] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
ARGUMENTS = [
    *("--model", str(MODEL), "--encoders", str({"text": TEXT}), "--dropout_ratio", "{'text': 0.3}"),
    *("--condition_config", "{'t2v': 1.0, 'i2v_head': 1.0}", "--no_i2v_ref_loss", "True", "--steps", "2"),
    *("--bucket_config", "{'8px_ar1:1': {9: (1.0, 8)}}"),
]


def test_given_frames_are_out_of_the_loss(tmp_path: Path) -> None:
    """Half of the samples have a first frame; other noise there changes no error, other noise elsewhere does."""
    run = build_toy(tmp_path, *ARGUMENTS)
    step, inputs = run.step_fn, run.step_fn.encode(next(run.batches))
    given = inputs.given_BT
    assert given[:, 0].any() and not given[:, 0].all() and not given[:, 1:].any()
    noise, t_B = torch.randn_like(inputs.x0_BCTHW), torch.full((len(given),), 0.6)
    with torch.no_grad():
        before = step.errors(inputs, noise, t_B)
        noise[:, :, 0] = torch.randn_like(noise[:, :, 0])
        after = step.errors(inputs, noise, t_B)
        noise[:, :, 1] = torch.randn_like(noise[:, :, 1])
        last = step.errors(inputs, noise, t_B)
    is_given = given[:, 0]
    assert torch.equal(before[is_given], after[is_given])
    assert (before[~is_given] != after[~is_given]).all() and (after != last).all()


def test_exported_it_is_diffusers_model(tmp_path: Path) -> None:
    """Trained, exported with its config.json, and read by diffusers: the same weights under the same names."""
    from diffusers import WanTransformer3DModel

    run = build_toy(tmp_path, *ARGUMENTS, "--ema_decay", "None")
    assert train(run)
    assert prepare([str(tmp_path / "toy"), str(tmp_path / "out"), "--dtype", "fp32"])() == 0
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    ours = run.step_fn.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
