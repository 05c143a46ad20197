"""A NeMo YAML of Wan becomes a config that reads back; each of its keys is carried over, or left out with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from opensora_like.config import read_config
from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.settings import RunConfig
from opensora_like.training.import_keys import READ, REASONS, RENAMED
from opensora_like.training.import_yaml import Imported, config_source, import_config, read_yaml, reason_for
from opensora_like.training.optim import build_rates

TRAIN = Path(__file__).parents[2] / "configs/diffusion/train"
# the published fine-tuning example; 5e-6 is a string to YAML, as it has no dot
FINETUNE = """
model:
  pretrained_model_name_or_path: Wan-AI/Wan2.1-T2V-1.3B-Diffusers
step_scheduler:
  global_batch_size: 8
  local_batch_size: 1
  num_epochs: 10
  ckpt_every_steps: 100
data:
  dataloader:
    meta_folder: "processed"
    num_workers: 2
optim:
  learning_rate: 5e-6
  optimizer:
    weight_decay: 0.01
    betas: [0.9, 0.999]
lr_scheduler:
  lr_decay_style: cosine
  lr_warmup_steps: 0
  min_lr: 1e-6
flow_matching:
  adapter_type: simple
  timestep_sampling: "uniform"
  flow_shift: 3.0
fsdp:
  dp_size: 8
checkpoint:
  enabled: true
  checkpoint_dir: "./checkpoints"
"""
PRETRAIN = FINETUNE.replace("model:\n", "model:\n  mode: pretrain\n  pipeline_spec:\n    subfolder: transformer\n", 1)
PRETRAIN = PRETRAIN.replace("5e-6", "5e-5").replace("0.01", "0.1").replace("0.999", "0.95").replace("3.0", "2.5")
PRETRAIN = PRETRAIN.replace('"uniform"', "logit_normal\n  logit_std: 1.5\n  mix_uniform_ratio: 0.2")
# every key of both programs that decides something about a run of Wan
LISTED = """
seed wandb.project wandb.mode wandb.name wandb.enable dist_env.backend dist_env.timeout_minutes
model.pretrained_model_name_or_path model.mode model.attention_backend model.cache_dir model.torch_dtype
model.compute_dtype model.model_type model.stage model.boundary_ratio model.transformer_engine_linear
model.transformer_engine_fp8 model.transformer_engine_fp8_recipe model.fuse_qkv_projections
model.compact_fused_qkv_projections model.optimize_hunyuan_flash_varlen_mask
model.pipeline_spec.transformer_cls model.pipeline_spec.pipeline_cls model.pipeline_spec.subfolder
model.pipeline_spec.load_full_pipeline model.pipeline_spec.enable_gradient_checkpointing
model.pipeline_spec.low_cpu_mem_usage
step_scheduler.global_batch_size step_scheduler.local_batch_size step_scheduler.num_epochs
step_scheduler.ckpt_every_steps step_scheduler.log_every step_scheduler.log_remote_every_steps
step_scheduler.max_steps step_scheduler.save_checkpoint_every_epoch step_scheduler.val_every_steps
step_scheduler.gc_every_steps step_scheduler.loss_average_window_steps step_scheduler.preemption_signal
optim.learning_rate optim.clip_grad optim.optimizer.weight_decay optim.optimizer.betas optimizer._target_ optimizer.lr
optimizer.weight_decay optimizer.betas optimizer.eps optimizer.fused optimizer.foreach optimizer.param_group_overrides
clip_grad_norm.max_norm
lr_scheduler.lr_decay_style lr_scheduler.lr_warmup_steps lr_scheduler.lr_decay_steps lr_scheduler.init_lr
lr_scheduler.max_lr lr_scheduler.min_lr lr_scheduler.start_wd lr_scheduler.end_wd lr_scheduler.wd_incr_style
lr_scheduler.wd_incr_steps lr_scheduler.wsd_decay_steps lr_scheduler.lr_wsd_decay_style
flow_matching.adapter_type flow_matching.adapter_kwargs flow_matching.num_train_timesteps
flow_matching.timestep_sampling flow_matching.flow_shift flow_matching.i2v_prob flow_matching.cfg_dropout_prob
flow_matching.logit_mean flow_matching.logit_std flow_matching.mix_uniform_ratio flow_matching.sigma_min
flow_matching.sigma_max flow_matching.use_loss_weighting flow_matching.loss_weighting_scheme
flow_matching.log_interval flow_matching.summary_log_interval flow_matching.beta_alpha flow_matching.beta_beta
flow_matching.use_sigma_noise
fsdp.dp_size fsdp.dp_replicate_size fsdp.tp_size fsdp.cp_size fsdp.pp_size fsdp.use_hf_tp_plan
fsdp.activation_checkpointing fsdp.cpu_offload fsdp.reduce_dtype fsdp.defer_fsdp_grad_sync fsdp.enable_fsdp2_prefetch
fsdp.fsdp2_backward_prefetch_depth fsdp.fsdp2_forward_prefetch_depth fsdp.enable_compile
fsdp.enable_async_tensor_parallel fsdp.sequence_parallel fsdp.cp_ring_degree fsdp.cp_ulysses_degree
fsdp.reshard_after_forward fsdp.activation_checkpointing_scope fsdp.autocast_dtype
data.dataloader._target_ data.dataloader.meta_folder data.dataloader.cache_dir data.dataloader.num_workers
data.dataloader.device data.dataloader.shuffle data.dataloader.drop_last data.dataloader.dynamic_batch_size
data.dataloader.base_resolution data.dataloader.model_type data.dataloader.max_files data.dataloader.prefetch_factor
checkpoint.enabled checkpoint.checkpoint_dir checkpoint.model_save_format checkpoint.save_consolidated
checkpoint.restore_from checkpoint.max_recent_checkpoints checkpoint.is_async checkpoint.diffusers_compatible
checkpoint.staging_dir checkpoint.wait_for_staging checkpoint.cpu_offload checkpoint.single_rank_consolidation
checkpoint.consolidation_timeout_minutes
performance.check_loss performance.grad_clip_foreach
peft._target_ peft.dim peft.alpha peft.dropout peft.target_modules peft.exclude_modules peft.match_all_linear
peft.use_dora peft.lora_dtype
"""
KEYS = LISTED.split()
VALUES: dict[str, Any] = {
    "model.pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "flow_matching.timestep_sampling": "logit_normal",
    "lr_scheduler.lr_decay_style": "WSD",
    "lr_scheduler.wd_incr_style": "cosine",
    "lr_scheduler.lr_wsd_decay_style": "minus_sqrt",
    "flow_matching.loss_weighting_scheme": "linear",
    "optim.optimizer.betas": [0.9, 0.99],
    "optimizer.betas": [0.9, 0.99],
    "peft.target_modules": ["to_q", "to_v"],
    "peft.exclude_modules": None,
}


def imported(tmp_path: Path, text: str, **arguments: str) -> Imported:
    (tmp_path / "in.yaml").write_text(text)
    return import_config(read_yaml(tmp_path / "in.yaml"), **arguments)


def read_back(tmp_path: Path, found: Imported) -> RunConfig:
    """The config as the program reads it from the file that is written."""
    (tmp_path / "out.py").write_text(config_source(found, source="in.yaml"))
    return read_config(tmp_path / "out.py").config


def same_training(one: RunConfig, other: RunConfig) -> None:
    """What decides about the updates is equal."""
    flow, others = (FlowMatching(**{k: v for k, v in c.scheduler.items() if k != "type"}) for c in (one, other))
    plain = {k: v for k, v in vars(flow).items() if not k.startswith("_")}
    assert plain == {k: v for k, v in vars(others).items() if not k.startswith("_")}
    assert dict(one.optim) == dict(other.optim) and dict(one.dropout_ratio) == dict(other.dropout_ratio)
    assert build_rates(one, total_steps=100) == build_rates(other, total_steps=100)
    for name in ("global_batch_size", "local_batch_size", "epochs", "ckpt_every", "dtype", "grad_clip", "num_workers"):
        assert getattr(one, name) == getattr(other, name), name
    assert dict(one.booster) == dict(other.booster)


def test_the_published_example_is_the_shipped_config(tmp_path: Path) -> None:
    """Fine-tuning: the same updates as configs/diffusion/train/wan2_1_t2v_1_3b.py."""
    found = imported(tmp_path, FINETUNE)
    config = read_back(tmp_path, found)
    same_training(config, read_config(TRAIN / "wan2_1_t2v_1_3b.py").config)
    assert config.model["variant"] == "t2v-1.3B" and config.model["grad_checkpoint"] is True
    assert config.dataset["cache_path"] == "processed" and config.outputs == "./checkpoints"
    assert {key for key, _ in found.lost} == {"fsdp.dp_size", "flow_matching.adapter_type"}


def test_two_nodes_get_a_batch_that_they_can_share(tmp_path: Path) -> None:
    """16 ranks cannot share the published 8 samples: 16 are written, and that is said."""
    found = imported(tmp_path, FINETUNE.replace("dp_size: 8", "dp_size: 16\n  dp_replicate_size: 2"))
    same_training(read_back(tmp_path, found), read_config(TRAIN / "wan2_1_t2v_1_3b_multinode.py").config)
    assert any("global_batch_size=8" in note and "written is global_batch_size=16" in note for note in found.notes)


def test_pretraining_begins_from_random_weights(tmp_path: Path) -> None:
    """mode: pretrain leaves out from_pretrained; the distribution of t is that of the shipped config."""
    config = read_back(tmp_path, imported(tmp_path, PRETRAIN))
    shipped = read_config(TRAIN / "wan2_1_t2v_1_3b_pretrain.py").config
    assert "from_pretrained" not in config.model and dict(config.optim) == dict(shipped.optim)
    assert dict(config.scheduler) == {**shipped.scheduler}


def test_every_known_key_has_an_answer(tmp_path: Path) -> None:
    """All at once: each is carried or left out, once, none as unknown; the config reads back."""
    keys = {key: VALUES.get(key, 1) for key in KEYS}
    keys |= {f"model.{name}": "bfloat16" for name in ("torch_dtype", "compute_dtype")}
    keys |= {"model.mode": "finetune", "model.model_type": "wan", "model.stage": "high_noise"}
    keys |= {"model.boundary_ratio": 0.875, "fsdp.reduce_dtype": "bfloat16", "checkpoint.checkpoint_dir": "ckpts"}
    keys |= {"checkpoint.restore_from": "LATEST", "data.dataloader.cache_dir": "cache", "fsdp.cpu_offload": True}
    keys |= {"wandb.project": "p", "wandb.name": "n", "wandb.mode": "offline", "data.dataloader.meta_folder": "cache"}
    keys |= {f"lr_scheduler.{name}": 1e-3 for name in ("init_lr", "min_lr", "start_wd", "end_wd")}
    keys |= {"lr_scheduler.end_wd": 0.1, "lr_scheduler.max_lr": 1.0, "lr_scheduler.lr_decay_steps": 9}
    keys |= {"flow_matching.sigma_min": 0.0, "fsdp.reshard_after_forward": True, "peft.use_dora": False}
    keys |= {"fsdp.activation_checkpointing": True, "peft.match_all_linear": False, "checkpoint.is_async": True}
    found = import_config(keys)
    answered = [key for key, _ in (*found.carried, *found.lost)]
    assert sorted(answered) == sorted(KEYS)
    assert not [key for key, why in found.lost if "no such key" in why]
    config = read_back(tmp_path, found)
    assert config.scheduler["t_min"] == 0.875 and config.scheduler["window"] == "truncate"
    assert config.lora_config == {"r": 1, "lora_alpha": 1, "lora_dropout": 1, "target_modules": ["to_q", "to_v"]} | {
        "use_dora": False
    }
    assert (config.load, config.exp_name, config.wandb, config.dtype) == ("latest", "n", True, "bf16")
    rates = build_rates(config, total_steps=100)
    assert (rates.schedule, rates.wsd_decay, rates.decay_steps) == ("wsd", "minus_sqrt", 9)
    assert rates.weight_decay == (1e-3, 0.1, 1, "cosine")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "timestep_sampling: beta\n  beta_alpha: 2.0",
            {"t_distribution": "beta", "beta_alpha": 2.0, "weight_slope": 3.0},
        ),
        ("timestep_sampling: uniform\n  use_sigma_noise: false", {"t_distribution": "uniform", "weight_slope": 3.0}),
        ("timestep_sampling: mix", {"t_distribution": "mix", "mix_uniform_ratio": 0.1, "shift": 3.0}),
        ("flow_shift: 5", {"t_distribution": "logit_normal", "mix_uniform_ratio": 0.1, "shift": 5}),
        (
            "timestep_sampling: uniform\n  use_loss_weighting: false\n  sigma_min: 0.001\n  sigma_max: 0.999",
            {"t_distribution": "uniform", "shift": 3.0, "t_min": 0.001, "t_max": 0.999, "weighting": None},
        ),
        (
            "timestep_sampling: logit_normal\n  loss_weighting_scheme: bsmntw\n  mix_uniform_ratio: 0",
            {"t_distribution": "logit_normal", "shift": 3.0, "mix_uniform_ratio": 0, "weighting": "bsmntw"},
        ),
    ],
)
def test_times_are_drawn_as_there(tmp_path: Path, lines: str, expected: dict[str, Any]) -> None:
    """Defaults included: they are part of what a YAML means."""
    text = FINETUNE.replace('timestep_sampling: "uniform"\n  flow_shift: 3.0', lines)
    scheduler = read_back(tmp_path, imported(tmp_path, text)).scheduler
    expected = {"type": "flow_matching", "sigma_min": 0.0, "weighting": "linear"} | expected
    assert dict(scheduler) == {k: v for k, v in expected.items() if v is not None}


def test_what_would_be_ignored_is_left_out(tmp_path: Path) -> None:
    """A value that its neighbours make meaningless, an unknown key, a value from the environment."""
    text = FINETUNE.replace("flow_shift: 3.0", "flow_shift: 3.0\n  logit_std: 1.0\n  mix_uniform_ratio: 0.1")
    text = text.replace("min_lr: 1e-6", "min_lr: 1e-6\n  init_lr: 1e-7").replace("dp_size: 8", "dp_sise: 8")
    lost = dict(imported(tmp_path, text + "seed: ${SEED}\n").lost)
    assert "timestep_sampling='uniform'" in lost["flow_matching.logit_std"]
    assert "flow_matching.mix_uniform_ratio" in lost and "lr_scheduler.init_lr" in lost
    assert "no such key" in lost["fsdp.dp_sise"] and "environment" in lost["seed"]
    assert reason_for("model.transformer_engine_fp8_amax_history_len") == "TransformerEngine is not used"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "black-forest-labs/FLUX.1-dev", "only Wan"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-VACE", "no published Wan of"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "none", "is not set"),
        ("lr_decay_style: cosine", "lr_decay_style: step", "lr_decay_style='step'"),
        ("fsdp:", "ddp:\n  backend: nccl\nfsdp:", "remove one section"),
        ("model:", "- model", "YAML"),
    ],
)
def test_yamls_that_cannot_be_imported(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Another model, an unknown style, both backends, no YAML."""
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, FINETUNE.replace(old, new))


def test_other_mistakes(tmp_path: Path) -> None:
    """No file; a bucket that is none."""
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        read_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="bucket='480p'"):
        imported(tmp_path, FINETUNE, bucket="480p")


def test_the_page_has_every_key() -> None:
    """docs/migration.md names each key that the importer knows, and the setting that it becomes."""
    page = (Path(__file__).parents[2] / "docs/migration.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.*]+)` \| (.+) \|$", page, re.M))
    for key in {*RENAMED, *READ, *REASONS}:
        assert key in rows, key
        if key in RENAMED:
            assert f"`{RENAMED[key]}`" in rows[key], key
        elif key in REASONS:
            assert rows[key] == f"none: {REASONS[key]}", key
