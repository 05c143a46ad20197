"""Samples the distilled experts of the Wan of toy size."""

_base_ = ["toy_wan_model.py"]

height = 16
width = 16
num_frames = 5
cond_type = "i2v_head"
sampler = "few_step"
few_step_times = [1.0, 0.75, 0.5, 0.25]
num_steps = 4
guidance = 1.0
guidance_img = 1.0
dtype = "fp32"
