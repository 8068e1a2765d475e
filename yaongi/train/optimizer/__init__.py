"""The optimizer: Teon, Muon or AdamW, by a parameter's role."""
