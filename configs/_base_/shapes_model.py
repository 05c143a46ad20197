"""A text-to-video model small enough to learn the shapes world on two CPU cores; everything from random weights.

The text encoders are frozen and random: different captions get different embeddings, which is all the world needs.
"""

model = dict(
    type="mmdit",
    in_channels=48,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=96,
    num_heads=3,
    depth=1,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
    patch_size=1,
    fused_qkv=False,
    use_liger_rope=True,
)
autoencoder = dict(type="patch", patch_size=4)
encoders = dict(
    text=dict(type="t5", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)),
    pooled=dict(type="clip", max_length=32, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)),
)
scheduler = dict(type="flow_matching")
