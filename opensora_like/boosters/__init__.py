"""Training backends behind one protocol; the loop never asks which one it has."""
