"""HunyuanVideo, text to video and image to video."""

from opensora_like.models.hunyuan_video.model import HunyuanVideo

__all__ = ["HunyuanVideo"]
