"""Checkpoints, resuming from them, and the model folder at the end."""
