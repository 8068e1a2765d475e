"""Attention of one new token per row to a cache."""
