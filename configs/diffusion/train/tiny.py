"""Text-to-video on your own videos with a small model from random weights; a start for configs of your own.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/tiny.py --dataset.data-path table.csv
Hardware: two CPU cores (float32) or any GPU (--dtype bf16); about 2 GiB of memory per process.
"""

_base_ = ["../../_base_/run.py", "../../_base_/tiny_model.py"]

dataset = dict(type="video_text", data_path="table.csv")
bucket_config = {"128px": {9: (1.0, 2), 1: (1.0, 4)}}
booster = dict(type="colossalai", plugin="zero2")
dtype = "fp32"
optim = dict(type="AdamW", lr=5e-4, weight_decay=0.01)
warmup_steps = 100
grad_clip = 1.0
ema_decay = 0.999
dropout_ratio = dict(text=0.1, pooled=0.1)
num_workers = 2
steps = 10000
