"""FantasyTalking: Wan 2.1 image-to-video, 14B at 720p, with what speech adds to it, and wav2vec 2.0.

hf download Wan-AI/Wan2.1-I2V-14B-720P-Diffusers --local-dir ckpts/Wan2.1-I2V-14B-720P-Diffusers
hf download acvlab/FantasyTalking fantasytalking_model.ckpt --local-dir ckpts/FantasyTalking
hf download facebook/wav2vec2-base-960h --local-dir ckpts/wav2vec2-base-960h
"""

model = dict(
    type="fantasy_talking",
    variant="i2v-14B",
    from_pretrained="./ckpts/Wan2.1-I2V-14B-720P-Diffusers/transformer",
    audio_pretrained="./ckpts/FantasyTalking/fantasytalking_model.ckpt",
)
autoencoder = dict(type="wan_vae", from_pretrained="./ckpts/Wan2.1-I2V-14B-720P-Diffusers/vae")
encoders = dict(
    text=dict(type="umt5", from_pretrained="./ckpts/Wan2.1-I2V-14B-720P-Diffusers", max_length=512),
    image_embeds=dict(type="clip_vision", from_pretrained="./ckpts/Wan2.1-I2V-14B-720P-Diffusers"),
    audio=dict(type="wav2vec2", from_pretrained="./ckpts/wav2vec2-base-960h"),
)
scheduler = dict(type="flow_matching", shift=5.0, sigma_min=0.0)
