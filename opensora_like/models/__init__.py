"""Denoisers, autoencoders and text encoders; one folder or file per architecture."""
