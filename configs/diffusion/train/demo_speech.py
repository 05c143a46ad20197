"""Speech on the speech world: a shape that is as large as its sound is loud. tools/prove.py speech runs it.

torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_speech.py
Hardware: two CPU cores; float32, because there it is faster than bfloat16. Measured on cores that were shared with
other work: 0.81 s/step, 16 minutes; loss 0.033 at the end; correlation of size and loudness 0.951 on 64 new clips.
"""

_base_ = ["../../_base_/run.py", "../../_base_/speech_world_model.py"]

dataset = dict(type="video_speech", data_path="outputs/demo_speech/clips/meta.csv")
bucket_config = {"16x16": {17: (1.0, 8)}}
condition_config = dict(_delete_=True, i2v_head=1.0)
dropout_ratio = dict(text=0.1, audio=0.1)
booster = dict(type="fsdp2")
dtype = "fp32"
optim = dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
steps = 1200
warmup_steps = 0.0417
lr_schedule = "cosine"
grad_clip = 1.0
ema_decay = 0.99
num_workers = 1
exp_name = "demo_speech"
