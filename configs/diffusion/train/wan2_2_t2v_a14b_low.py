"""Fine-tune the low-noise expert of Wan 2.2 text-to-video; times are drawn from below 0.875 alone.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_2_t2v_a14b_low.py \
    --dataset.data-path datasets/metadata_meta.csv
Hardware: as wan2_2_t2v_a14b_high.py.
"""

_base_ = ["../../_base_/run.py", "../../_base_/wan2_2_t2v_a14b_models.py", "../../_base_/wan_videos_train.py"]

model = dict(from_pretrained="./ckpts/Wan2.2-T2V-A14B-Diffusers/transformer_2", grad_checkpoint=True)
scheduler = dict(t_distribution="uniform", t_max=0.875, window="truncate")
ckpt_every = 50
