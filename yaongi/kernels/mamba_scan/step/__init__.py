"""The single step of Mamba-2's recurrence."""
