"""The sources of documents: the embedded corpus, files, the hub."""
