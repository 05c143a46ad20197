"""Fine-tune Wan 2.1 1.3B on cached latents, from the published weights; one node.

python tools/cache_latents.py --video_folder VIDEOS --output_folder cache/480p \
    --model ckpts/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --center-crop
torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_1_t2v_1_3b.py
Hardware: 8 GPUs of 40 GB (published minimum: 4). Memory: predicted 11 GiB per GPU; s/step and loss: not measured yet.
The numbers are those of NeMo's fine-tuning config; loss weight 1 + 3t as there.
"""

_base_ = ["../../_base_/run.py", "../../_base_/wan2_1_models.py", "../../_base_/wan2_1_train.py"]

model = dict(grad_checkpoint=True)
scheduler = dict(t_distribution="uniform", shift=3.0, weighting="linear")
optim = dict(type="AdamW", lr=5e-6, weight_decay=0.01, betas=(0.9, 0.999))
lr_schedule = "cosine"
min_lr = 1e-6
epochs = 10
ckpt_every = 100
