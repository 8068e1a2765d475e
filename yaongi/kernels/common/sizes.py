"""Whole numbers of blocks and powers of two on the host, where Triton's own functions take microseconds a call."""


def cdiv(total: int, block: int) -> int:
    """Return how many blocks cover the total."""
    return -(-total // block)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0
