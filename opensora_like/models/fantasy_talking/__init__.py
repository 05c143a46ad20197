"""FantasyTalking: Wan 2.1 image to video that is driven by speech."""

from opensora_like.models.fantasy_talking.model import FantasyTalking

__all__ = ["FantasyTalking"]
