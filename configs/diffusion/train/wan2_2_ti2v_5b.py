"""Fine-tune Wan 2.2 TI2V-5B on videos: half of the samples with their first frame given, which no loss is taken of.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_2_ti2v_5b.py \
    --dataset.data-path datasets/metadata_meta.csv
Hardware: 8 GPUs of 80 GB. Memory, s/step and loss: not measured yet. Sides are multiples of 32.
"""

_base_ = ["../../_base_/run.py", "../../_base_/wan2_2_ti2v_5b_models.py", "../../_base_/wan_videos_train.py"]

model = dict(grad_checkpoint=True)
scheduler = dict(t_distribution="uniform")
dataset = dict(fps_max=24.0)
condition_config = dict(t2v=1.0, i2v_head=1.0)
no_i2v_ref_loss = True
ckpt_every = 50
