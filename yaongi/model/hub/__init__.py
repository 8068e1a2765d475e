"""Model folders in and out: Hugging Face's `nemotron_h`, and our own `yaongi` where there is an Engram."""
