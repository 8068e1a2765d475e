"""RMS norms around the mixers: one after the residual sum, one over groups of gated channels."""
