"""Format counts, bytes and durations for people. Every message, table and plot uses these functions."""

from __future__ import annotations

import math

_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((2.0**50, "PiB"), (2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def format_count(value: float | int) -> str:
    """Format with three significant digits and k, M, B (10^9) or T (10^12)."""
    for size, unit in _COUNT_UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"


def format_bytes(value: float | int) -> str:
    """Format with three significant digits and a binary unit: 1536 bytes are 1.50 KiB. Fewer than 1,000 bytes are whole."""
    for size, unit in _BYTE_UNITS:
        scaled = abs(value) / size
        if 999.5 * size <= 1024 * abs(value):  # as the next smaller unit, it would have four digits
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{math.copysign(scaled, value):,.{digits}f} {unit}"
    return f"{value:.0f} byte{'' if abs(value) == 1 else 's'}"


def format_duration(seconds: float | int | None) -> str:
    """Format as days, hours, minutes and seconds, or as a dash if there is no finite number."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}:{minutes:02}:{rest:02}"
