"""How a run is kept: logs, checkpoints, seed."""

outputs = "outputs"
seed = 42
log_every = 10
ckpt_every = 1000
keep_n_latest = 5
tensorboard = True
wandb = False
