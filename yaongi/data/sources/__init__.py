"""Where documents come from: the embedded corpus, files, the hub."""
