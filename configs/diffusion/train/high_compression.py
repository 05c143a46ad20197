"""Open-Sora v2 on the latents of a DC-AE, 32 x 32 x 4 pixels each: text and images to video at 768px up to 128 frames.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/high_compression.py \
    --dataset.data-path table.csv
Hardware: 8 GPUs of 140 GB. Memory: predicted 74 GiB at most per GPU.
"""

_base_ = [
    "../../_base_/opensora_v2_model.py",
    "../../_base_/opensora_v2_train.py",
    "../../_base_/buckets_high_compression.py",
]

model = dict(in_channels=128, patch_size=1, cond_embed=True, grad_ckpt_settings=(100, 100))
autoencoder = dict(
    _delete_=True,
    type="dc_ae",
    model_name="dc-ae-f32t4c128",
    from_pretrained="./ckpts/F32T4C128_AE.safetensors",
    scaling_factor=0.493,
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=256,
    temporal_tile_size=32,
    tile_overlap_factor=0.25,
    dtype="bf16",
)
condition_config = dict(t2v=1.0, i2v_head=7.0)
optim = dict(lr=3e-5)
ckpt_every = 250
