"""Cross entropy over a vocabulary, with one pass over the logits in each direction."""
