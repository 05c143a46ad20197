"""A model of a few thousand weights on clips without files; what tests of the loop train."""

custom_imports = ["tests.training.toy_videos"]
model = dict(
    type="mmdit",
    in_channels=12,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
    patch_size=1,
    cond_embed=True,
)
autoencoder = dict(type="patch", patch_size=2)
encoders = dict(
    text=dict(type="t5", max_length=16, dtype="fp32", tiny=dict(hidden_size=16, num_layers=1, num_heads=2)),
    pooled=dict(type="clip", max_length=16, dtype="fp32", tiny=dict(hidden_size=16, num_layers=1, num_heads=2)),
)
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
