"""Train and fine-tune video diffusion transformers from inheritable Python configs."""

__version__ = "0.1.0"
