"""The short name of configs/diffusion/train/stage1.py: videos from text at 256px; command, hardware, memory are there.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/stage1.py --dataset.data-path table.csv
"""

_base_ = ["diffusion/train/stage1.py"]
