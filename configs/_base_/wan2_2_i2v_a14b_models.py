"""Wan 2.2 image-to-video: the expert for high noise, the autoencoder and the umT5 of its folder; no image encoder.

hf download Wan-AI/Wan2.2-I2V-A14B-Diffusers --local-dir ckpts/Wan2.2-I2V-A14B-Diffusers
There `transformer` is the expert for high noise (t from 0.9 on), `transformer_2` that for low noise. In the folder of
the original code they are `high_noise_model` and `low_noise_model`; weights of either layout are read.
"""

model = dict(type="wan", variant="i2v-A14B", from_pretrained="./ckpts/Wan2.2-I2V-A14B-Diffusers/transformer")
autoencoder = dict(type="wan_vae", from_pretrained="./ckpts/Wan2.2-I2V-A14B-Diffusers/vae")
encoders = dict(text=dict(type="umt5", from_pretrained="./ckpts/Wan2.2-I2V-A14B-Diffusers", max_length=512))
scheduler = dict(type="flow_matching", shift=5.0, sigma_min=0.0)
