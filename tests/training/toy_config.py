"""A model of a few thousand weights on clips without files; what tests of the loop train."""

_base_ = ["toy_model.py"]

custom_imports = ["tests.training.toy_videos"]
dataset = dict(type="toy_videos")
bucket_config = {"8px_ar1:1": {1: (1.0, 3), 5: (1.0, 2), 9: (0.5, 2)}}
condition_config = dict(t2v=1, i2v_head=1)
dropout_ratio = dict(text=0.3, pooled=0.3)
booster = dict(type="ddp")
dtype = "fp32"
optim = dict(type="AdamW", lr=1e-2, weight_decay=0.01)
warmup_steps = 3
ema_decay = 0.9
num_workers = 0
log_every = 1
tensorboard = False
exp_name = "toy"
