"""Numbers and foreign text as a reader meets them on a page or in a terminal."""

from __future__ import annotations

import math
import re

from longsift.selection import Spread

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)


def plain(text: object) -> str:
    """Text in which characters that would not be seen, or would turn the line around, stand as escapes."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], str(text).replace("\r\n", "\n"))


def brief(text: str, most: int = 120) -> str:
    """A text that may be long, its beginning then."""
    return text if len(text) <= most else text[:most] + "…"


def count(value: int) -> str:
    return f"{value:,}"


def tokens(value: int) -> str:
    return scaled(value, "")


def scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{value:,.0f} {unit}".strip()


def number(value: float | None) -> str:
    if value is None:
        return "–"
    power = _power(value)
    return _digits(value / 10.0**power) + _times(power)


def spread(spread: Spread) -> str:
    power = _power(spread.mean)
    mean = _digits(spread.mean / 10.0**power)
    decimals = len(mean.partition(".")[2])
    both = f"{mean} ± {spread.std / 10.0**power:,.{decimals}f}"
    return f"({both}){_times(power)}" if power else both


def _power(value: float) -> int:
    """The power of ten to write apart: 0 for numbers that read well as they are."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return 0
    return math.floor(math.log10(abs(value)))


def _times(power: int) -> str:
    return f"·10{str(power).translate(_SUPERSCRIPTS)}" if power else ""


def _digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}".replace("-", "−")


def tick(value: float) -> str:
    return f"{value:,.6g}".replace("-", "−") if abs(value) >= 1e-3 or value == 0 else number(value)


def share(value: float) -> str:
    return f"{100 * value:.3g} %"


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "3 min 20 s" or "12 days 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = [(whole // 86_400, "days"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(i for i, (value, _) in enumerate(parts) if value)
    shown = [f"{value:,} {unit}" for value, unit in parts[first : first + 2] if value]
    return " ".join(shown).replace("1 days", "1 day", 1) if parts[0][0] == 1 else " ".join(shown)
