"""The shapes world's model in the latents of a small HunyuanVideo autoencoder: 32x32 pixels, 5 frames to 4x4, 2.

Its weights are random, and made by tools/prove.py latents, which also measures the two factors that bring latents of
these clips to a mean of 0 and unit variance. Random weights decode nothing: latents are read, not pictures.
"""

_base_ = ["shapes_model.py"]

model = dict(in_channels=16)
autoencoder = dict(
    _delete_=True,
    type="hunyuan_vae",
    from_pretrained="outputs/demo_latents/autoencoder.safetensors",
    latent_channels=16,
    layers_per_block=1,
    norm_num_groups=4,
    block_out_channels=(8, 8, 16, 16),
)
