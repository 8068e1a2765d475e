"""Tuning of a trained model: `python -m yaongi.tune`, by the trainer's session with a loader of its own."""
