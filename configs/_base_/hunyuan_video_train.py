"""How HunyuanVideo is fine-tuned, whatever it starts from: clips of up to 81 frames in an area of 640x640 pixels.

fps_max=16 takes every second frame of clips of 24 to 32 per second. Weights are sharded over all ranks (FSDP2);
--booster "{'type': 'deepspeed', 'stage': 2}" and ColossalAI's ZeRO give the same numbers.
"""

dataset = dict(type="video_text", data_path="datasets/clips.csv", fps_max=16.0, fps_in_caption=False)
dropout_ratio = dict(text=0.1, pooled=0.1)
guidance = 6.0
optim = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10, betas=(0.9, 0.999))
lr_schedule = "constant"
warmup_steps = 100
grad_clip = 0.05
booster = dict(type="fsdp2")
dtype = "bf16"
epochs = 100
num_workers = 8
