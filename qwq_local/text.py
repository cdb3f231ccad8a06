"""Amounts as people write them: bytes, durations, counts."""

from __future__ import annotations

MB, GB = 10**6, 10**9
MIB, GIB = 2**20, 2**30


def binary_size(n_bytes: int, digits: int = 1) -> str:
    """A number of bytes in powers of 1024, as memory is counted: `18.5 GiB`, `2.8 MiB`, `512 bytes`."""
    return _in_units(n_bytes, digits, (("GiB", GIB), ("MiB", MIB)))


def decimal_size(n_bytes: int, digits: int = 1) -> str:
    """A number of bytes in powers of 1000, as the hub counts files: `19.9 GB`, `3.4 MB`, `512 bytes`."""
    return _in_units(n_bytes, digits, (("GB", GB), ("MB", MB)))


def _in_units(n_bytes: int, digits: int, units: tuple[tuple[str, int], ...]) -> str:
    for unit, factor in units:
        # A tenth of the unit and more is written in it: 0.5 GiB reads better beside 12.3 GiB.
        if abs(n_bytes) * 10 >= factor:
            return f"{n_bytes / factor:,.{digits}f} {unit}"
    return f"{n_bytes:,} bytes"


def duration(seconds: float) -> str:
    """A time that passed: 0.4 s is `0s`, 72 s are `1m12s`, 7,320 s are `2h02m`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def time_left(seconds: float) -> str:
    """A time still to wait: `22 s`, and from a minute on as `duration` writes it."""
    return f"{int(seconds + 0.5)} s" if seconds < 59.5 else duration(seconds)


def plural(count: int, noun: str) -> str:
    """A count and its noun: `1 turn`, `1,234 turns`, `2 passes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
