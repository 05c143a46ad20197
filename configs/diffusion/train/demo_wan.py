"""Text-to-video on the shapes world with a small Wan denoiser, from cached latents. tools/prove.py wan runs it.

python tools/cache_latents.py configs/diffusion/train/demo_wan.py --out outputs/demo_wan/cache \
    --dataset "{'type': 'video_text', 'data_path': 'outputs/demo/clips/meta.csv', 'fps_in_caption': False}"
torchrun --nproc_per_node 2 scripts/diffusion/train.py configs/diffusion/train/demo_wan.py
Hardware: two CPU cores; float32, because there it is faster than bfloat16. Measured: 0.14 s/step, 10 minutes; loss
0.041 at the end; colour 100 %, direction 99 %, shape 65 % of 160 samples.
"""

_base_ = ["../../_base_/run.py"]

model = dict(
    type="wan",
    num_attention_heads=7,
    attention_head_dim=32,
    ffn_dim=512,
    num_layers=3,
    in_channels=48,
    out_channels=48,
    text_dim=64,
    freq_dim=96,
    text_length=32,
)
# With the denoiser's own patches of 2: tokens of 4 frames of 4x4 pixels, so that motion is seen inside of a token. From
# tokens of one frame it was not learned. The 192 numbers of a token have to fit into the width, 224.
autoencoder = dict(type="patch", patch_size=2, temporal_stride=4)
encoders = dict(text=dict(type="umt5", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)))
scheduler = dict(type="flow_matching", logit_mean=0.7)  # towards noise, where the way of a shape is decided
dataset = dict(type="latents", cache_path="outputs/demo_wan/cache")
bucket_config = {"16x16": {5: (1.0, 8)}}
booster = dict(type="fsdp2")
dtype = "fp32"
optim = dict(type="AdamW", lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
global_batch_size = 16
local_batch_size = 8
steps = 4000
warmup_steps = 0.025
lr_schedule = "cosine"
grad_clip = 1.0
ema_decay = 0.99
dropout_ratio = dict(text=0.1)
num_workers = 1
exp_name = "demo_wan"
