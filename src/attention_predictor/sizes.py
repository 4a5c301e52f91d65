"""Human-readable sizes in bytes."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(nbytes: float) -> str:
    """``"312 bytes"``, ``"1.50 KiB"``, ``"15.26 GiB"``: in the largest unit that gives at least one."""
    if round(nbytes) < 1024:
        return f"{round(nbytes)} byte{'' if round(nbytes) == 1 else 's'}"
    size, unit = float(nbytes), 0
    while round(size, 2) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.2f} {UNITS[unit]}"
