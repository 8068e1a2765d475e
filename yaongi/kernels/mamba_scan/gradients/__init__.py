"""The backward pass of the scan."""
