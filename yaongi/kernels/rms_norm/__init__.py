"""RMS norms around the mixers: after the residual sum, and over groups of gated channels."""
