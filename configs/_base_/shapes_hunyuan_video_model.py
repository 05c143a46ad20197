"""A HunyuanVideo small enough to learn the shapes world on two CPU cores; the encoders are frozen and random."""

model = dict(
    type="hunyuan_video",
    num_attention_heads=7,
    attention_head_dim=32,
    num_layers=1,
    num_single_layers=3,
    num_refiner_layers=1,
    in_channels=48,
    text_dim=64,
    pooled_dim=64,
    rope_axes_dim=(8, 12, 12),
    guidance_embeds=False,
    token_replace=True,
)
# With the denoiser's own patches of 2: tokens of 4 frames of 4x4 pixels, so that motion is seen inside of a token. From
# tokens of one frame it was not learned. The 192 numbers of a token have to fit into the width, 224.
autoencoder = dict(type="patch", patch_size=2, temporal_stride=4)
encoders = dict(
    text=dict(type="llm", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=3, num_heads=2)),
    pooled=dict(type="clip", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)),
)
scheduler = dict(type="flow_matching", logit_mean=0.7)  # towards noise, where the way of a shape is decided
