"""Samples from a run of configs/diffusion/train/tiny.py.

python scripts/diffusion/inference.py configs/diffusion/inference/tiny.py --ckpt-path outputs/RUN --prompt "..."
"""

_base_ = ["../../_base_/tiny_model.py"]

resolution = "128px"
aspect_ratio = "16:9"
num_frames = 9
num_steps = 30
guidance = 3.0
text_osci = False
fps_save = 24
dtype = "fp32"
