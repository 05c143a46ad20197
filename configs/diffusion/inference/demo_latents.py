"""Samples of the shapes world in the latents of a random autoencoder; tools/prove.py latents reads them undecoded.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_latents.py --prompt "a red circle moving left"
"""

_base_ = ["../../_base_/shapes_latents_model.py", "../../_base_/shapes_sampling.py"]

ckpt_path = "outputs/demo_latents/train"
save_dir = "outputs/demo_latents/samples"
height = 32
width = 32
