"""The states between the chunks of the Mamba-2 scan."""
