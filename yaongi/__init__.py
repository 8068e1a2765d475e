"""Open-Yaongi: kernels and a trainer for Mamba-2 + mixture-of-experts language models on one H100."""

import os

__version__ = "0.1.0"
# Read when torch is loaded, so it is set before. By default OpenMP threads wait in a busy loop, which makes a loaded
# machine five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
