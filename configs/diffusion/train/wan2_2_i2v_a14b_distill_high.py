"""Distil the high-noise expert of Wan 2.2 image-to-video into its two of four steps, by adapters.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_2_i2v_a14b_distill_high.py \
    --dataset.data-path datasets/metadata_meta.csv
Hardware: 8 GPUs of 80 GB; memory in docs/distillation.md is computed, s/step and losses are not measured yet.
Steps at t = 1 and 0.9375 with the shift of 5; scores look from 0.9 up. 50 updates are 9 of the generator.
"""

_base_ = ["wan2_2_i2v_a14b_high.py", "../../_base_/wan2_2_distill.py"]

distill = dict(boundary=0.9)
optim = dict(lr=1e-5)
warmup_steps = 0
exp_name = "wan2_2_i2v_a14b_distill_high"
