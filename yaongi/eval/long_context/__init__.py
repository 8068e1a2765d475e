"""Whether a model uses a long context: bits per byte by position, and a number to be found again."""
