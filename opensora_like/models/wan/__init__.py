"""Wan 2.1 and 2.2, text to video and image to video."""

from opensora_like.models.wan.model import Wan

__all__ = ["Wan"]
