"""Open-Sora v2 on the latents of a DC-AE: FLUX.1-dev draws an image, a video of 128 frames at 768px goes on from it.

torchrun --nproc_per_node 1 scripts/diffusion/inference.py configs/diffusion/inference/high_compression.py \
    --prompt "raining, sea"
Latents are scaled by 0.493 as in training. From text alone: --first-image none --cond-type t2v. Hardware: one GPU; more
of them make a video each, as published, and --sp-size all lets them share each.
Memory: weights as t2i2v_256px.py, fewer tokens.
"""

_base_ = ["t2i2v_768px.py"]

model = dict(in_channels=128, patch_size=1, from_pretrained="./ckpts/Open_Sora_v2_Video_DC_AE.safetensors")
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
num_frames = 128
sp_size = 1
