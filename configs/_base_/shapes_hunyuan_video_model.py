"""A HunyuanVideo small enough to learn the shapes world on two CPU cores; the encoders are frozen and random."""

model = dict(
    type="hunyuan_video",
    num_attention_heads=3,
    attention_head_dim=32,
    num_layers=1,
    num_single_layers=3,
    num_refiner_layers=1,
    in_channels=12,
    text_dim=64,
    pooled_dim=64,
    rope_axes_dim=(8, 12, 12),
    guidance_embeds=False,
    token_replace=True,
)
autoencoder = dict(type="patch", patch_size=2)  # with the denoiser's own patches of 2: tokens of 4x4 pixels
encoders = dict(
    text=dict(type="llm", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=3, num_heads=2)),
    pooled=dict(type="clip", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)),
)
scheduler = dict(type="flow_matching")
