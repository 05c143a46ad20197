"""The training loop and what happens in one of its steps."""
