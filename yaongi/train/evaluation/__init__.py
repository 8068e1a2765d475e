"""What a run measures between steps: bits per byte, scores on tasks, samples of its text."""
