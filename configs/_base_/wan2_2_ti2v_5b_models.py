"""Wan 2.2 TI2V-5B: one denoiser for text and first frame, its own 4x16x16 autoencoder, umT5.

hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --local-dir ckpts/Wan2.2-TI2V-5B-Diffusers
"""

model = dict(
    type="wan",
    variant="ti2v-5B",
    token_replace=True,
    from_pretrained="./ckpts/Wan2.2-TI2V-5B-Diffusers/transformer",
)
autoencoder = dict(type="wan_vae", version="2.2", from_pretrained="./ckpts/Wan2.2-TI2V-5B-Diffusers/vae")
encoders = dict(text=dict(type="umt5", from_pretrained="./ckpts/Wan2.2-TI2V-5B-Diffusers", max_length=512))
scheduler = dict(type="flow_matching", shift=5.0, sigma_min=0.0)
