"""Wan 2.2 image-to-video in four steps without guidance: two distilled experts, two steps each.

python scripts/diffusion/inference.py configs/diffusion/inference/wan2_2_i2v_a14b_distill.py --prompt "a cat walks" \
    --ref cat.png
Hardware: as wan2_2_t2v_a14b.py; four evaluations in place of eighty.
"""

_base_ = ["wan2_2_i2v_a14b.py"]

lora_checkpoint = "outputs/wan2_2_i2v_a14b_distill_high"
other_expert = dict(lora_checkpoint="outputs/wan2_2_i2v_a14b_distill_low")
sampler = "few_step"
few_step_times = [1.0, 0.75, 0.5, 0.25]
num_steps = 4
time_grid = "even"
guidance = 1.0
