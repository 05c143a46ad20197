"""Wan 2.1 text-to-video: the denoiser of 1.3 billion weights, the 4x8x8 autoencoder, umT5; as published for diffusers.

hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir ckpts/Wan2.1-T2V-1.3B-Diffusers
"""

model = dict(type="wan", variant="t2v-1.3B", from_pretrained="./ckpts/Wan2.1-T2V-1.3B-Diffusers/transformer")
autoencoder = dict(type="wan_vae", from_pretrained="./ckpts/Wan2.1-T2V-1.3B-Diffusers/vae")
encoders = dict(text=dict(type="umt5", from_pretrained="./ckpts/Wan2.1-T2V-1.3B-Diffusers", max_length=512))
scheduler = dict(type="flow_matching", shift=3.0, sigma_min=0.0)
