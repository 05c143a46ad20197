"""Distil the low-noise expert of Wan 2.2 image-to-video into its two of four steps, by adapters.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_2_i2v_a14b_distill_low.py \
    --dataset.data-path datasets/metadata_meta.csv \
    --distill.before.lora_checkpoint outputs/wan2_2_i2v_a14b_distill_high
Hardware: 8 GPUs of 80 GB; memory in docs/distillation.md is computed, s/step and losses are not measured yet.
Steps at t = 0.8333 and 0.625, from what the distilled high expert makes of noise; scores look below 0.9.
"""

_base_ = ["wan2_2_i2v_a14b_low.py", "../../_base_/wan2_2_distill.py"]

distill = dict(boundary=0.9, before=dict(from_pretrained="./ckpts/Wan2.2-I2V-A14B-Diffusers/transformer"))
optim = dict(lr=1e-5)
warmup_steps = 0
exp_name = "wan2_2_i2v_a14b_distill_low"
