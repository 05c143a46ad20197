"""The model of the toy runs: a few thousand weights."""

model = dict(
    type="mmdit",
    in_channels=12,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
    patch_size=1,
    cond_embed=True,
)
autoencoder = dict(type="patch", patch_size=2)
encoders = dict(
    text=dict(type="t5", max_length=16, dtype="fp32", tiny=dict(hidden_size=16, num_layers=1, num_heads=2)),
    pooled=dict(type="clip", max_length=16, dtype="fp32", tiny=dict(hidden_size=16, num_layers=1, num_heads=2)),
)
