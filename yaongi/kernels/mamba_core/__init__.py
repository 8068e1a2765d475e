"""The part of a Mamba-2 mixer between its two projections, as one op."""
