"""Train Wan 2.1 1.3B from random weights; 10,000 clips or more.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/wan2_1_t2v_1_3b_pretrain.py
Hardware: 8 GPUs of 40 GB. Memory: predicted 12 GiB per GPU; s/step and loss: not measured yet.
The numbers are those of NeMo's pretraining config; the warm-up is ours.
"""

_base_ = ["../../_base_/run.py", "../../_base_/wan2_1_models.py", "../../_base_/wan2_1_train.py"]

model = dict(from_pretrained=None, grad_checkpoint=True)
scheduler = dict(
    t_distribution="logit_normal",
    logit_std=1.5,
    mix_uniform_ratio=0.2,
    shift=2.5,
    weighting="linear",
)
optim = dict(type="AdamW", lr=5e-5, weight_decay=0.1, betas=(0.9, 0.95))
warmup_steps = 1000
epochs = 100
ema_decay = 0.9999
