"""A Wan of toy size that is shown given frames as published i2v weights are."""

model = dict(
    type="wan",
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=32,
    num_layers=2,
    in_channels=100,
    out_channels=48,
    text_dim=16,
    freq_dim=16,
    text_length=16,
)
autoencoder = dict(type="patch", patch_size=2, temporal_stride=4)
encoders = dict(text=dict(type="umt5", max_length=16, dtype="fp32", tiny=dict(hidden_size=16, num_layers=1)))
scheduler = dict(type="flow_matching", shift=5.0, sigma_min=0.0)
