"""Open-Yaongi: kernels and a trainer for Mamba-2 + mixture-of-experts language models on one H100."""

__version__ = "0.1.0"
