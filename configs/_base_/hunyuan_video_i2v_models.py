"""HunyuanVideo image-to-video: the denoiser that keeps a given first frame, and LLaVA, which sees it with the caption.

hf download hunyuanvideo-community/HunyuanVideo-I2V --local-dir ckpts/HunyuanVideo-I2V
"""

_base_ = ["hunyuan_video_models.py"]

model = dict(variant="i2v", from_pretrained="./ckpts/HunyuanVideo-I2V/transformer")
autoencoder = dict(from_pretrained="./ckpts/HunyuanVideo-I2V/vae")
encoders = dict(
    text=dict(type="llava", from_pretrained="./ckpts/HunyuanVideo-I2V"),
    pooled=dict(from_pretrained="./ckpts/HunyuanVideo-I2V"),
)
