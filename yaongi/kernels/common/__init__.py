"""Helpers that several ops share: the compute dtype, TMA descriptors, and sums in a fixed order."""
