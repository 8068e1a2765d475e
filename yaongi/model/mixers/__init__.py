"""The three mixers of a layer: Mamba-2, experts, attention."""
