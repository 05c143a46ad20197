"""HunyuanVideo text-to-video: a denoiser of 13 billion weights, LLaMA for tokens, CLIP for the caption.

hf download hunyuanvideo-community/HunyuanVideo --local-dir ckpts/HunyuanVideo
"""

model = dict(type="hunyuan_video", variant="t2v", from_pretrained="./ckpts/HunyuanVideo/transformer")
autoencoder = dict(
    type="hunyuan_vae",
    from_pretrained="./ckpts/HunyuanVideo/vae",
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    sample_tsize=16,
    dtype="bf16",
)
encoders = dict(
    text=dict(type="llm", from_pretrained="./ckpts/HunyuanVideo", max_length=256),
    pooled=dict(type="clip", from_pretrained="./ckpts/HunyuanVideo", max_length=77),
)
scheduler = dict(type="flow_matching", shift=7.0, sigma_min=0.0)
