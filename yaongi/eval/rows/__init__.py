"""Rows of packed token sequences, and the batches that are made of them."""
