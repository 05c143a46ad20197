"""From videos and captions to what a run reads: lists of clips, and latents and embeddings that are encoded once."""
