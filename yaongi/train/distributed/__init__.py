"""Training with several processes; with one process the same calls do nothing."""
