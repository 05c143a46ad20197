"""Wan 2.1 1.3B: a video of 81 frames at 480x832 from text, as diffusers' WanPipeline makes it.

python scripts/diffusion/inference.py configs/diffusion/inference/wan2_1_t2v_1_3b.py --prompt "a cat walks on grass"
A fine-tuned one: --ckpt-path outputs/RUN
Hardware: one GPU. Memory: weights in bfloat16 are predicted to take 14 GiB (umT5 10.6, denoiser 2.7); --offload True
keeps them in host memory.
"""

_base_ = ["../../_base_/wan2_1_models.py"]

autoencoder = dict(dtype="fp32")
height = 480
width = 832
num_frames = 81
num_steps = 50
sampler = "unipc"
time_grid = "diffusers"
guidance = 5.0
text_osci = False
fps_in_caption = False
fps_save = 16
dtype = "bf16"
save_dir = "samples"
