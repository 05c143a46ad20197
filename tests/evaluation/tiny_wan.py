"""Samples from a Wan of a few thousand weights; for tests of validation."""

model = {
    "type": "wan",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 48,
    "num_layers": 1,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": 16,
    "freq_dim": 32,
}
autoencoder = {"type": "patch", "patch_size": 2}
encoders = {
    "text": {
        "type": "umt5",
        "max_length": 16,
        "dtype": "fp32",
        "tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }
}
scheduler = {"type": "flow_matching", "shift": 3.0}
height = 16
width = 16
num_frames = 5
num_steps = 2
guidance = 3.0
text_osci = False
fps_in_caption = False
fps_save = 8
dtype = "fp32"
