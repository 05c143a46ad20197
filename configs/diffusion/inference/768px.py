"""Open-Sora v2 at 768px: a video of 129 frames from text, or from text and an image.

torchrun --nproc_per_node 8 scripts/diffusion/inference.py configs/diffusion/inference/768px.py --prompt "raining, sea"
All processes share each video; one process is enough, too. With several videos to make and room for one on each GPU,
--sp-size 1 is faster. Hardware: GPUs of 80 GB or more (predicted). Memory: as 256px.py, and about 12 times the tokens.
"""

_base_ = ["256px.py"]

resolution = "768px"
sp_size = "all"
