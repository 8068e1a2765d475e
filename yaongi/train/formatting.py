"""Numbers as text for people."""

import math


def scientific(value: float) -> str:
    """Format as in `2.0e-3`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def significant(value: float) -> str:
    """Format with three significant digits: `632`, `41.8`, `0.0312`."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def short(value: float) -> str:
    """Format as in `83k`, `1.2M`, `950`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}" if value < 10 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Format as in `12d04h`, `46h04m`, `3m20s`, `12s`."""
    whole = round(seconds)
    if whole >= 4 * 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def gigabytes(size: int) -> str:
    """Format as in `70.8 GB`, `12MB`."""
    return f"{significant(size / 1e9)} GB" if size >= 1e8 else f"{short(size)}B"
