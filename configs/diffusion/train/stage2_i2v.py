"""Open-Sora v2 stage 2 with given frames: text and images to video at 256px and 768px, a sample over 4 ranks.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage2_i2v.py \
    --dataset.data-path table.csv --model.from_pretrained ckpts/Open_Sora_v2.safetensors
Hardware: 8 GPUs of 140 GB and 25 GiB of pinned host memory per GPU, which hold activations (the published run's buffer
of this size counts elements, so it had 50). Memory: predicted 125 GiB at most per GPU (256px images), without that.
"""

_base_ = ["../../_base_/opensora_v2_stage2.py", "../../_base_/buckets_stage2_i2v.py", "../../_base_/i2v_tasks.py"]

model = dict(cond_embed=True)
grad_ckpt_buffer_size = 26_843_545_600
