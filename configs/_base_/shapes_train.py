"""How the shapes world is learned on two CPU cores: booster, optimizer and number of steps."""

booster = dict(type="colossalai", plugin="zero2")
dtype = "fp32"
optim = dict(type="AdamW", lr=2e-3, weight_decay=0.0)
steps = 4000
lr_schedule = "cosine"
grad_clip = 1.0
ema_decay = 0.99
dropout_ratio = dict(text=0.1, pooled=0.1)
num_workers = 1
