"""Engram (arXiv 2601.07372): memory looked up by hashed n-grams."""
