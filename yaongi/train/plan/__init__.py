"""The plan of a run, printed before it starts."""
