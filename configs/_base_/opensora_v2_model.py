"""Open-Sora v2: an MMDiT of 11.9 billion weights, HunyuanVideo's autoencoder, T5 for tokens, CLIP for the caption."""

model = dict(
    type="mmdit",
    in_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10000.0,
    qkv_bias=True,
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    patch_size=2,
)
autoencoder = dict(
    type="hunyuan_vae",
    from_pretrained="./ckpts/hunyuan_vae.safetensors",
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    latent_channels=16,
    use_spatial_tiling=True,
    use_temporal_tiling=False,
    dtype="bf16",
)
encoders = dict(
    text=dict(type="t5", from_pretrained="./ckpts/google/t5-v1_1-xxl", max_length=512),
    pooled=dict(type="clip", from_pretrained="./ckpts/openai/clip-vit-large-patch14", max_length=77),
)
scheduler = dict(type="flow_matching", shift="resolution")
