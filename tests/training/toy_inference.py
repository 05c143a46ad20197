"""Samples from the toy config's checkpoints."""

_base_ = ["toy_model.py"]

height = 16
width = 16
num_frames = 5
num_steps = 4
dtype = "fp32"
