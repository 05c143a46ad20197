"""How Open-Sora v2 was trained, whatever the stage; a stage adds its buckets and its learning rate.

Captions drop out with 0.3162 per encoder, so both are gone with 0.1. For a table with a column score_vmafmotion,
--dataset.vmaf True tells it in the captions, as the published training did. The published optimizer is HybridAdam;
AdamW makes the same updates, and needs no compiler, with which HybridAdam is built when it is first used.
"""

dataset = dict(
    type="video_text",
    data_path="datasets/pexels_45k_necessary.csv",
    transform_name="resize_crop",
    fps_max=24.0,
)
dropout_ratio = dict(text=0.31622777, pooled=0.31622777)
optim = dict(type="AdamW", lr=1e-5, eps=1e-15, betas=(0.9, 0.999), weight_decay=0.0)
booster = dict(
    type="colossalai",
    plugin="zero2",
    plugin_config=dict(reduce_bucket_size_in_m=128, overlap_allgather=False),
)
dtype = "bf16"
grad_clip = 1.0
accumulation_steps = 1
warmup_steps = 0
epochs = 1000
num_workers = 12
prefetch_factor = 2
outputs = "outputs"
seed = 42
log_every = 10
ckpt_every = 100
keep_n_latest = 20
wandb = False
wandb_project = "mmdit"
