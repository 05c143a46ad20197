"""Fine-tune HunyuanVideo, image to video: the first frame is given and left out of the loss.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/hunyuan_video_i2v.py \
    --dataset.data-path table.csv
Hardware: 8 GPUs of 80 GB. Memory: predicted 61 GiB per GPU; s/step and loss: not measured yet.
"""

_base_ = ["../../_base_/run.py", "../../_base_/hunyuan_video_i2v_models.py", "../../_base_/hunyuan_video_train.py"]

model = dict(grad_checkpoint=True)
scheduler = dict(t_distribution="uniform", shift=7.0)
condition_config = dict(i2v_head=1.0)
no_i2v_ref_loss = True
bucket_config = {"640px": {81: (1.0, 1), 49: (1.0, 1), 25: (1.0, 1)}}
ckpt_every = 50
