"""Sizes in words: "80GiB", "70GB" or plain bytes."""

import re

# Powers of 1024 for the binary units, of 1000 for the decimal ones, as IEC 80000-13 has it.
UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}


def parse_bytes(size: int | str, field: str = "size") -> int:
    """Read a size as a number of bytes.

    Args:
        size: Bytes as a number, or a number with a unit: ``"80GiB"``, ``"70 GB"``, ``"1.5e9"``. Case does not matter.
        field: What the size is called where the user wrote it, for the message.

    Returns:
        int: The size in bytes, rounded down.

    Raises:
        ValueError: If this is no positive size, or the unit is none of ``UNITS``.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", str(size).lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or isinstance(size, bool) or number <= 0:
        raise ValueError(f"{field} must be a positive size such as '80GiB', '70GB' or a number of bytes, got {size!r}")
    if match[2] and match[2] not in _BY_LOWER_CASE:
        raise ValueError(f"{field}={size!r} has an unknown unit; the units are {', '.join(UNITS)}")
    return int(number * _BY_LOWER_CASE[match[2] or "b"])


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes with the binary unit that keeps it below 1024, as in ``"22.3 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
