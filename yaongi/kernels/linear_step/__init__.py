"""Products of few rows with a weight, as in generation."""
