"""A FantasyTalking denoiser of a few thousand weights on clips with sound; what tests of speech train."""

model = {
    "type": "fantasy_talking",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "num_layers": 2,
    "in_channels": 100,
    "out_channels": 48,
    "text_dim": 16,
    "freq_dim": 16,
    "image_dim": 16,
    "text_length": 8,
    "audio_dim": 16,
    "audio_width": 12,
}
autoencoder = {"type": "patch", "patch_size": 2, "temporal_stride": 4}
encoders = {
    "text": {
        "type": "umt5",
        "max_length": 8,
        "dtype": "fp32",
        "tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    },
    "image_embeds": {"type": "clip_vision", "dtype": "fp32", "tiny": {}},
    "audio": {"type": "wav2vec2", "tiny": {}},
}
dataset = {"type": "video_speech", "data_path": "clips.csv"}
bucket_config = {"16x16": {5: (1.0, 2)}}
condition_config = {"i2v_head": 1.0}
dropout_ratio = {"text": 0.2, "audio": 0.3}
booster = {"type": "ddp"}
dtype = "fp32"
optim = {"type": "AdamW", "lr": 1e-2}
grad_clip = 1.0
num_workers = 0
log_every = 1
tensorboard = False
exp_name = "speech"
