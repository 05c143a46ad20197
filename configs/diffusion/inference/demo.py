"""Samples of the shapes world from the demo's checkpoint.

python scripts/diffusion/inference.py configs/diffusion/inference/demo.py --prompt "a red circle moving left"
"""

_base_ = ["../../_base_/shapes_model.py"]

ckpt_path = "outputs/demo/train"
save_dir = "outputs/demo/samples"
height = 16
width = 16
num_frames = 5
num_steps = 30
guidance = 3.0
text_osci = False
fps_in_caption = False
fps_save = 8
batch_size = 48
overwrite = True
num_sample = 4
dtype = "fp32"
