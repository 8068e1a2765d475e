"""Mamba-2's recurrence: the chunked scan over a sequence, and its single step."""
