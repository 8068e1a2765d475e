"""The corpus inside the package: no download, a few megabytes, the same every time."""
