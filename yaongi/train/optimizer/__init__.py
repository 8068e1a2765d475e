"""Teon, Muon and AdamW by role."""
