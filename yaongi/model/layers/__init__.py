"""What the mixers are built of: projections, norms, and gradients that accumulate in place."""
