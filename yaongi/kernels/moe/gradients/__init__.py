"""The backward pass of the experts."""
