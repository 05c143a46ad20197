"""Fine-tune the high-noise expert of Wan 2.2 text-to-video; times are drawn from 0.875 up alone.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_2_t2v_a14b_high.py \
    --dataset.data-path datasets/metadata_meta.csv
Hardware: 8 GPUs of 80 GB; with --lora-config less. Memory, s/step and loss: not measured yet.
"""

_base_ = ["../../_base_/run.py", "../../_base_/wan2_2_t2v_a14b_models.py", "../../_base_/wan_videos_train.py"]

model = dict(grad_checkpoint=True)
scheduler = dict(t_distribution="uniform", t_min=0.875, window="truncate")
ckpt_every = 50
