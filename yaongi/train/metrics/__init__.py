"""What a run measures, records and prints."""
