"""Depthwise causal convolution over short windows, with activation, document boundaries and state."""
