"""A FantasyTalking denoiser small enough to learn the speech world on two CPU cores; everything from random weights.

Tokens of 4 frames of 4x4 pixels, as in demo_wan. The sound comes as loudness itself, 50 times a second, so that what is
learned is to listen: which part of it belongs to which frames, and what to draw.
"""

model = dict(
    type="fantasy_talking",
    num_attention_heads=7,
    attention_head_dim=32,
    ffn_dim=448,
    num_layers=3,
    in_channels=100,
    out_channels=48,
    text_dim=64,
    freq_dim=96,
    text_length=20,
    audio_dim=4,
    audio_width=32,
)
autoencoder = dict(type="patch", patch_size=2, temporal_stride=4)
encoders = dict(
    text=dict(type="umt5", max_length=20, dtype="fp32", tiny=dict(hidden_size=64, num_layers=1)),
    audio=dict(type="loudness"),
)
scheduler = dict(type="flow_matching", logit_mean=0.7)
