"""What lies between the two projections of a Mamba-2 mixer."""
