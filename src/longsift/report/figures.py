"""The charts of a report that do not move: measures, their joint plot, lengths of documents and places in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longsift.distributions import Cell
from longsift.report.charts import heat_map, histogram
from longsift.report.words import count
from longsift.selection import Choice

_CELLS = 40  # bins of a heat map, in each direction
_DEPTHS = 20  # bins of a place in the document


@dataclass(frozen=True)
class Figure:
    """A chart with its title and what has to be said of it."""

    title: str
    note: str
    chart: dict[str, Any]


def figures(choice: Choice, unit: str) -> list[Figure]:
    """The charts of all groups together, none where nothing was measured.

    Args:
        unit: of a score.
    """
    if not choice.windows:
        return []
    names = [term.column for term in choice.rule.terms]
    found = []
    for i in range(0, len(names), 2):
        joint = choice.measures(i, min(i + 1, len(names) - 1), _CELLS)
        for name, axis in zip(names[i : i + 2], "xy", strict=False):
            bars = _marginal(joint, axis)
            found.append(Figure(name, "all groups", histogram(f"Histogram of {name}", bars, x=name)))
        if i + 1 < len(names):
            both = f"{names[i]} and {names[i + 1]}"
            chart = heat_map(f"Windows by {both}", _rows(joint), x=names[i], y=names[i + 1])
            found.append(Figure(both, "all groups; denser where more windows lie", chart))
    lengths = choice.lengths(_CELLS)
    if lengths:
        chart = heat_map(
            "Windows by the length of their document and their score",
            _rows(lengths),
            x="tokens of the document",
            y=f"score, {unit}",
            log_x=True,
        )
        found.append(Figure("Score and length of the document", "a document ends with its last scored window", chart))
    depths = choice.depths(_DEPTHS)
    if depths and any(depths[0]):
        found.append(_depths(*depths))
    return found


def _depths(windows: Sequence[int], kept: Sequence[int], whole: int) -> Figure:
    step = 100 / len(windows)
    bars = [
        {"x": i * step, "x2": (i + 1) * step, "n": n, "kept": k}
        for i, (n, k) in enumerate(zip(windows, kept, strict=True))
        if n
    ]
    chart = histogram(
        "Windows by their place in the document", bars, x="middle of the window, % of the document", domain=(0, 100)
    )
    one = f"without {count(whole)} windows that are all of their document" if whole else "all groups"
    return Figure("Place in the document", one, chart)


def _marginal(cells: Sequence[Cell], axis: str) -> list[dict[str, float]]:
    """The cells of a row or a column as one bar."""
    bars: dict[tuple[float, float], list[int]] = defaultdict(lambda: [0, 0])
    for cell in cells:
        bar = bars[(cell.x, cell.x2) if axis == "x" else (cell.y, cell.y2)]
        bar[0] += cell.windows
        bar[1] += cell.kept
    return [{"x": low, "x2": high, "n": n, "kept": k} for (low, high), (n, k) in sorted(bars.items())]


def _rows(cells: Sequence[Cell]) -> list[dict[str, float]]:
    return [
        {
            "x": _short(cell.x),
            "x2": _short(cell.x2),
            "y": _short(cell.y),
            "y2": _short(cell.y2),
            "n": cell.windows,
            "kept": cell.kept,
        }
        for cell in cells
    ]


def _short(value: float) -> float:
    return float(f"{value:.7g}")
