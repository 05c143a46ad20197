"""Samples of the shapes world that go on from a first frame.

python scripts/diffusion/inference.py configs/diffusion/inference/demo_i2v.py --prompt "a red circle moving left" \
    --ref frame.png
"""

_base_ = ["demo.py"]

model = dict(cond_embed=True)
ckpt_path = "outputs/demo_i2v/train"
save_dir = "outputs/demo_i2v/samples"
cond_type = "i2v_head"
guidance_img = 1.0
image_osci = False
scale_temporal_osci = False
num_sample = 1
