"""Ranks that finish each step together, for steps of up to 64 micro-batches that divide 64."""

balance = dict(window=4096, group=64)
