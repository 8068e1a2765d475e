"""One page on a run."""
