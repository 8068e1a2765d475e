"""Reading and writing model folders: Hugging Face's `nemotron_h` layout, or our own `yaongi` for models with Engram."""
