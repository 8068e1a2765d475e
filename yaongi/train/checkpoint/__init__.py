"""Checkpoints, resuming from them, and the model at the end."""
