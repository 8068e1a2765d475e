"""Building blocks of the mixers: projections, norms, and gradient accumulation in place."""
