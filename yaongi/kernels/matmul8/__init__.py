"""Products of FP8 matrices, rounded to a wider dtype or added to a float32 sum."""
