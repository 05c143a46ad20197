"""Open-Sora v2 stage 2: videos from text at 256px and 768px, the tokens of a sample over 4 ranks.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage2.py --dataset.data-path table.csv
Hardware: 8 GPUs of 140 GB. Memory: predicted 101 GiB at most per GPU (256px images).
"""

_base_ = ["../../_base_/opensora_v2_stage2.py", "../../_base_/buckets_stage2.py"]
