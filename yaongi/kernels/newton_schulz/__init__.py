"""Orthogonalisation by Newton-Schulz steps, and the Teon/Muon update built on it."""
