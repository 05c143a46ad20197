"""From a batch of clips and captions to what the denoiser is given."""
