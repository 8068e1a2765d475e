"""What is left out of the sources: duplicates, and texts of benchmarks."""
