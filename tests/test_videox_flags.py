"""docs/migration.md says of every flag of VideoX-Fun's trainers what it is here; what it names exists."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.settings import Distill, InferenceConfig, Optim, RunConfig

DOCS = Path(__file__).parent.parent / "docs"
SECTION = (DOCS / "migration.md").read_text().split("# Coming from VideoX-Fun")[1]
TABLE = SECTION.split("## Flags of VideoX-Fun")[1].split("\n## ")[0]
FLAGS = """
pretrained_model_name_or_path config_path pretrained_audio_model_name_or_path transformer_path vae_path
revision variant non_ema_revision cache_dir train_data_dir train_data_meta max_train_samples output_dir
logging_dir seed train_batch_size vae_mini_batch num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing selective_ac learning_rate learning_rate_critic scale_lr lr_scheduler lr_warmup_steps
use_8bit_adam use_came allow_tf32 use_ema dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon max_grad_norm abnormal_norm_clip_start initial_grad_norm_ratio report_model_info mixed_precision
report_to tracker_project_name local_rank checkpointing_steps checkpoints_total_limit resume_from_checkpoint
save_state validation_prompts validation_paths validation_image_paths validation_audio_paths validation_epochs
validation_steps uniform_sampling train_sampling_steps weighting_scheme logit_mean logit_std mode_scale
motion_sub_loss motion_sub_loss_ratio enable_bucket random_ratio_crop random_frame_crop random_hw_adapt
training_with_video_token_length auto_tile_batch_size keep_all_node_same_token_length token_sample_size
video_sample_size image_sample_size fix_sample_size video_sample_stride video_sample_n_frames video_repeat
enable_text_encoder_in_dataloader tokenizer_max_length num_hidden_layers_to_skip image_embed_interleave
guidance_scale train_mode boundary_type trainable_modules trainable_modules_low_learning_rate rank
network_alpha use_peft_lora target_name lora_skip_name train_text_encoder gen_update_interval
real_guidance_scale fake_guidance_scale denoising_step_indices_list negative_prompt use_deepspeed use_fsdp
low_vram multi_stream push_to_hub hub_token hub_model_id input_perturbation noise_offset snr_loss
prediction_type random_flip
""".split()  # noqa: SIM905 -- a list of words is easier to compare

# what the table quotes that is a value, not a setting
VALUES = """
window full normal i2v ti2v none mode logit_normal sigma_sqrt cosmap _base_ dict grad_norm latest constant
constant_with_warmup cosine_with_restarts polynomial offload ref audio llava
"""


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_stands_in_the_table(flag: str) -> None:
    """Once, with a setting or the reason why there is none."""
    rows = [line for line in TABLE.splitlines() if line.startswith("|") and f"`--{flag}`" in line.split("|")[1]]
    assert len(rows) == 1
    assert len(rows[0].split("|")[2].strip()) > 3


def test_settings_that_the_table_names_exist() -> None:
    """Top-level names, and those of sections whose class is known; files that it names are there."""
    fields = {f.name for schema in (RunConfig, InferenceConfig) for f in dataclasses.fields(schema)}
    sections = {
        "optim": {f.name for f in dataclasses.fields(Optim)},
        "distill": {f.name for f in dataclasses.fields(Distill)},
        "scheduler": set(inspect.signature(FlowMatching).parameters),
        "autoencoder": set(inspect.signature(WanVAE).parameters),
    }
    others = set(VALUES.split())
    for line in TABLE.splitlines():
        if not line.startswith("| `--"):
            continue
        for code in re.findall(r"`([^`]+)`", line.split("|")[2]):
            name = re.split(r"[=({]", code)[0]
            top, _, rest = name.partition(".")
            if name.startswith("tools/"):
                assert (DOCS.parent / name.split()[0]).is_file(), name
            elif re.fullmatch(r"[a-z_0-9]+", top) and name not in others and "_size" not in name and name != "1:":
                assert top in fields | {"t_min", "t_max", "t_distribution", "cache_dir", "constant"}, name
                assert top not in sections or not rest or rest in sections[top], name
    for link in re.findall(r"\]\(([a-z_]+\.md)\)", SECTION):
        assert (DOCS / link).is_file(), link
