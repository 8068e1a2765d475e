"""The stages of `python -m yaongi.data`, one file each."""
