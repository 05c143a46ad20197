"""Trains the Wan of toy size on clips without files, each with its first frame."""

_base_ = ["toy_wan_model.py"]

custom_imports = ["tests.training.toy_videos"]
dataset = dict(type="toy_videos")
bucket_config = {"16px_ar1:1": {5: (1.0, 2), 9: (1.0, 2)}}
condition_config = dict(i2v_head=1.0)
booster = dict(type="ddp")
dtype = "fp32"
optim = dict(type="AdamW", lr=1e-2)
ema_decay = 0.9
num_workers = 0
log_every = 1
tensorboard = False
steps = 3
exp_name = "wan"
