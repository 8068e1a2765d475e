"""The corpus inside the package: a few megabytes, without a download, always the same."""
