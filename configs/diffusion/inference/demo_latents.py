"""Samples of the shapes world in the latents of a random autoencoder; tools/prove.py latents reads them undecoded.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_latents.py --prompt "a red circle moving left"
"""

_base_ = ["../../_base_/shapes_latents_model.py"]

ckpt_path = "outputs/demo_latents/train"
save_dir = "outputs/demo_latents/samples"
height = 32
width = 32
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
