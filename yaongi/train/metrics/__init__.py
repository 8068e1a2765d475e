"""What a run says as it goes."""
