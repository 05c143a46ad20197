"""Open-Sora v2, images from text at 256px, 768px and 1024px.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/image.py --dataset.data-path table.csv
Hardware: 8 GPUs of 140 GB. Memory: predicted 141 GiB at most per GPU (256px images): set
model.grad_ckpt_settings (19, 100) where that is too much.
"""

_base_ = [
    "../../_base_/opensora_v2_model.py",
    "../../_base_/opensora_v2_train.py",
    "../../_base_/buckets_image.py",
]

model = dict(grad_ckpt_settings=(8, 100))
