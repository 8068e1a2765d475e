"""Depthwise causal convolution over short windows, with its activation, its document boundaries and its state."""
