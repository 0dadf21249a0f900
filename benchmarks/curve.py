"""The picture of the long windows: seconds and memory by length, both on logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, HEIGHT = 300, 300  # of a panel
LEFT, TOP, BOTTOM = 60, 30, 40  # beside, above and below it
COLORS = ("#0b6e99", "#d9730d", "#0f7b6c", "#6940a5", "#ad1a72")


def curve(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG of what `long_windows.py` measured; the panel of the memory is left out where it was not measured."""
    titles = dict.fromkeys(row["case"] for row in rows)
    panels = [_panel(rows, lambda row: row["seconds"], "seconds", LEFT)]
    if all(row["peak_bytes"] is not None for row in rows):
        panels.append(_panel(rows, lambda row: row["peak_bytes"] / 2**30, "peak GiB", 2 * LEFT + WIDTH))
    height = TOP + HEIGHT + BOTTOM + 18 * len(titles)
    legend = [
        f'<text x="{LEFT}" y="{TOP + HEIGHT + BOTTOM + 14 + 18 * i}" fill="{color}">{title}</text>'
        for i, (title, color) in enumerate(zip(titles, COLORS, strict=False))
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (LEFT + WIDTH) + LEFT} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *panels, *legend, "</svg>"]) + "\n"


def _panel(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], unit: str, left: float) -> str:
    lengths = sorted({row["length"] for row in rows})
    values = [value(row) for row in rows]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(length: int) -> float:
        return left + WIDTH * math.log2(length / lengths[0]) / (math.log2(lengths[-1] / lengths[0]) or 1.0)

    def y(number: float) -> float:
        return TOP + HEIGHT * (1 - (math.log10(number) - low) / ((high - low) or 1))

    parts = [f'<text x="{left}" y="{TOP - 14}">{unit} by tokens of a window</text>']
    for power in range(low, high + 1):
        at = y(10**power)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for length in lengths:
        name = f"{length // 1024}K" if length < 1 << 20 else f"{length >> 20}M"
        parts.append(f'<text x="{x(length):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{name}</text>')
    for title, color in zip(dict.fromkeys(row["case"] for row in rows), COLORS, strict=False):
        points = [(x(row["length"]), y(value(row))) for row in rows if row["case"] == title]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points]
    return "\n".join(parts)
