"""Sums that several kernels end with."""
