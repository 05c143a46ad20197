"""Open-Sora v2 at 256px: FLUX.1-dev draws an image from the text, and a video of 129 frames goes on from it.

torchrun --nproc_per_node 1 --standalone scripts/diffusion/inference.py configs/diffusion/inference/t2i2v_256px.py \
    --prompt "raining, sea"
FLUX.1-dev is looked for in the layout of diffusers; its text encoders are those of Open-Sora and are read once.
Hardware: one GPU. Memory: predicted 34 GiB while images are drawn (T5 9, FLUX 22), then as 256px.py; with
--offload True about 24 GiB.
"""

_base_ = ["256px.py"]

first_image = dict(
    type="flux_image",
    from_pretrained="./ckpts/FLUX.1-dev",
    resolution="768px",
    num_steps=50,
    guidance=4.0,
    share_encoders=True,
)
cond_type = "i2v_head"
