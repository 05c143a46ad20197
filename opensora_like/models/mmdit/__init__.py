"""MMDiT, the denoiser of FLUX and Open-Sora v2."""

from opensora_like.models.mmdit.model import MMDiT
from opensora_like.models.tokens import patchify, position_ids, unpatchify

__all__ = ["MMDiT", "patchify", "position_ids", "unpatchify"]
