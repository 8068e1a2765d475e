"""What several ops share: the compute dtype, TMA descriptors, sums in a fixed order."""
