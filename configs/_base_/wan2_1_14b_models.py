"""Wan 2.1 text-to-video: the denoiser of 14 billion weights, with the autoencoder and the umT5 of its folder.

hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir ckpts/Wan2.1-T2V-14B-Diffusers
"""

model = dict(type="wan", variant="t2v-14B", from_pretrained="./ckpts/Wan2.1-T2V-14B-Diffusers/transformer")
autoencoder = dict(type="wan_vae", from_pretrained="./ckpts/Wan2.1-T2V-14B-Diffusers/vae")
encoders = dict(text=dict(type="umt5", from_pretrained="./ckpts/Wan2.1-T2V-14B-Diffusers", max_length=512))
scheduler = dict(type="flow_matching", shift=3.0, sigma_min=0.0)
