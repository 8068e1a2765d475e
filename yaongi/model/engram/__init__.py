"""Engram (arXiv 2601.07372): a table of vectors looked up by hashed n-grams."""
