"""Checkpoints: written aside, published by rename, read by range."""
