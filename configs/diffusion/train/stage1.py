"""Open-Sora v2 stage 1: videos from text at 256px up to 129 frames, images up to 1024px.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py --dataset.data-path table.csv
From published weights: --model.from_pretrained ckpts/Open_Sora_v2.safetensors
Hardware: 8 GPUs of 140 GB. Memory: predicted 134 GiB at most per GPU (768px images).
"""

_base_ = [
    "../../_base_/opensora_v2_model.py",
    "../../_base_/opensora_v2_train.py",
    "../../_base_/buckets_stage1.py",
]

model = dict(grad_ckpt_settings=(8, 100))
optim = dict(lr=5e-5)
ckpt_every = 2000
