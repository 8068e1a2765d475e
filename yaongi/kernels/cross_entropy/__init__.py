"""Cross entropy over a vocabulary, one pass over the logits each way."""
