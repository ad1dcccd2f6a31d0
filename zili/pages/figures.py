"""Numbers as people read them, and round ticks for axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

THIN = "\u202f"
"""Narrow no-break space between a number and its unit."""


def compact(value: float, digits: int = 3) -> str:
    """`12_345` as `12.3k`, `0.00031` as `3.1e-4`; `digits` significant digits, no trailing zeros."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (1 - 0.5 * 10**-digits):
            return _trimmed(value / limit, digits) + letter
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return _trimmed(value, digits)


def _trimmed(value: float, digits: int) -> str:
    if not value:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `5 min 12 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{compact(seconds) if seconds < 10 else whole}{THIN}s"
    for large, small, names in ((86_400, 3_600, "d h"), (3_600, 60, "h min"), (60, 1, "min s")):
        if whole >= large:
            units = names.split()
            rest = whole % large // small
            return f"{whole // large}{THIN}{units[0]}" + (f" {rest}{THIN}{units[1]}" if rest else "")
    raise AssertionError("unreachable")


def byte_size(size: float) -> str:
    """Bytes in decimal units: `3.2 MB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{_trimmed(size / limit, 3)}{THIN}{unit}"
    return f"{size:,.0f}{THIN}bytes"


def binary_size(size: float) -> str:
    """Bytes in binary units, as chips' memory is told: `12.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.4g} {unit}"


def percent(share: float) -> str:
    """`0.713` as `71 %`, one decimal below ten."""
    return f"{_trimmed(100 * share, 2) if abs(share) < 0.1 else round(100 * share)}{THIN}%"


def along(share: float) -> str:
    """A share of a page's element as CSS has it: `12.34%`."""
    return f"{100 * share:.2f}%"


FORMS = (compact, duration, byte_size, binary_size, percent, along)
"""Filters that every template has."""


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round values within `[low, high]`, 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 2.5, 5, 10), key=lambda m: abs(m * power - rough)) * power
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(max(count, 0))]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within `[low, high]`; only the powers where those would crowd."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 300 * low else (1,)
    found = [t for p in powers for m in steps if low * 0.999 <= (t := m * 10.0**p) <= high * 1.001]
    return found[:: math.ceil(len(found) / 8)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis, all with as many decimals as the finest needs."""
    largest = max(map(abs, ticks), default=0.0)
    for decimals in range(5 if 1e-3 <= largest < 1e4 else 0):
        if all(math.isclose(round(t, decimals), t, rel_tol=1e-9, abs_tol=1e-12) for t in ticks):
            return [f"{t:,.{decimals}f}" for t in ticks] if largest < 1e3 else [compact(t, 4) for t in ticks]
    return [compact(t, 4) for t in ticks]
