"""A small text-to-video model from random weights, without any file: latents are 16x16 blocks of pixels.

For trying a table and the machinery on a laptop. The text encoders are frozen and random.
"""

model = dict(
    type="mmdit",
    in_channels=768,
    vec_in_dim=128,
    context_in_dim=128,
    hidden_size=256,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(16, 24, 24),
    patch_size=1,
    fused_qkv=False,
    use_liger_rope=True,
)
autoencoder = dict(type="patch", patch_size=16)
encoders = dict(
    text=dict(type="t5", max_length=128, dtype="fp32", tiny=dict(hidden_size=128, num_layers=2)),
    pooled=dict(type="clip", max_length=128, dtype="fp32", tiny=dict(hidden_size=128, num_layers=2)),
)
scheduler = dict(type="flow_matching", shift="resolution")
