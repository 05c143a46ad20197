"""Open-Sora v2 at 768px: a video of 129 frames from text, or from text and an image.

python scripts/diffusion/inference.py configs/diffusion/inference/768px.py --prompt "raining, sea"
Hardware: one GPU of 80 GB or more (predicted). Memory: as 256px.py, and about 12 times the tokens.
"""

_base_ = ["256px.py"]

resolution = "768px"
