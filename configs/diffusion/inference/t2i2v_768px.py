"""Open-Sora v2 at 768px: FLUX.1-dev draws an image from the text, and a video of 129 frames goes on from it.

torchrun --nproc_per_node 8 --standalone scripts/diffusion/inference.py configs/diffusion/inference/t2i2v_768px.py \
    --prompt "raining, sea"
All processes share each video; one process is enough, too. Hardware and memory: those of 768px.py.
"""

_base_ = ["t2i2v_256px.py"]

resolution = "768px"
sp_size = "all"
