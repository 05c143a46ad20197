"""Wan 2.2 TI2V-5B: 121 frames at 704x1280 from text, or with a first frame.

python scripts/diffusion/inference.py configs/diffusion/inference/wan2_2_ti2v_5b.py --prompt "a cat walks on grass"
With a first frame: --cond-type i2v_head --ref cat.png. A fine-tuned one: --ckpt-path outputs/RUN
Hardware: one GPU. Weights: umT5 10.6 GiB, denoiser 9.3 (bfloat16), autoencoder 2.6 (float32); --offload True keeps in
host memory what is not in use. Nothing was measured on a GPU yet.
"""

_base_ = ["../../_base_/wan2_2_ti2v_5b_models.py", "../../_base_/wan_sampling.py"]

autoencoder = dict(dtype="fp32")
height = 704
width = 1280
num_frames = 121
num_steps = 50
guidance = 5.0
fps_save = 24
