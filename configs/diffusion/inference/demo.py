"""Samples of the shapes world from the demo's checkpoint.

python scripts/diffusion/inference.py configs/diffusion/inference/demo.py --prompt "a red circle moving left"
"""

_base_ = ["../../_base_/shapes_model.py", "../../_base_/shapes_sampling.py"]

ckpt_path = "outputs/demo/train"
save_dir = "outputs/demo/samples"
height = 16
width = 16
