"""The page of a comparison: both runs side by side, their agreement by group, and the windows they disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from longsift import __version__
from longsift.comparison import BINS, CURVE, Comparison, Disagreement, Side, described_parameters
from longsift.report import charts
from longsift.report.rendering import render
from longsift.report.words import plain
from longsift.shards import RunFolder
from longsift.tables import publish
from longsift.texts import excerpts

_HEAD, _TAIL = 1300, 700  # characters of a window's text that are shown
_TICKS = {"values": [0, 20, 40, 60, 80, 100]}  # of an axis in percent


def write_comparison(comparison: Comparison, page: Path) -> Path:
    """Write a comparison as one self-contained page.

    Texts are those of B's windows, where they are still there.

    Raises:
        OutputError: the page cannot be written, or the windows are not those that were scored.
    """
    windows = RunFolder(comparison.b.folder).windows
    places = {(window.shard, window.row): window.window_id for window in comparison.disagreements}
    html = render(
        "compare.html.jinja",
        comparison=comparison,
        facts=list(_facts(comparison.a, comparison.b)),
        differing=list(_shelves(comparison.disagreements)),
        texts=excerpts(windows, places, _HEAD, _TAIL) if windows.is_dir() else None,
        charts={
            "overlap": _overlap_chart(comparison),
            "ranks": rank_chart(
                comparison, "rank in A, % of the group; 0 is the best", "rank in B, % of the group", 330
            ),
        },
        version=__version__,
        drawn=sum(1 for group in comparison.groups if group.curve),
    )
    with publish(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def _facts(a: Side, b: Side) -> Iterator[tuple[str, str, str]]:
    def parameters(side: Side) -> str:
        return ", ".join(described_parameters(side)) or "–"

    def model(side: Side) -> str:
        return side.model + (f" @ {side.revision[:12]}" if side.revision else "")

    yield "Folder", a.folder, b.folder
    yield "Method", a.method, b.method
    yield "Parameters", parameters(a), parameters(b)
    yield "Score", a.score, b.score
    yield "Calculator", model(a), model(b)
    yield "Computed in", a.dtype, b.dtype
    yield "Windows measured", f"{a.windows:,}", f"{b.windows:,}"
    if a.failed or b.failed:
        yield "Windows that failed", f"{a.failed:,}", f"{b.failed:,}"


def _shelves(
    windows: Sequence[Disagreement],
) -> Iterator[tuple[str, list[tuple[str, list[Disagreement]]]]]:
    """Group → what is higher in A, what is higher in B."""
    for group, members in groupby(windows, key=lambda window: window.group):
        yield (
            group,
            [
                (f"Higher in {higher.upper()}", list(shelf))
                for higher, shelf in groupby(members, key=lambda window: window.higher)
            ],
        )


def _overlap_chart(comparison: Comparison) -> dict[str, Any]:
    """Overlap by share: a line for all groups, thin ones for each, and what chance would give."""

    def line(name: str, curve: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"line": name, "share": 100 * share, "overlap": 100 * value}
            for share, value in zip(CURVE, curve, strict=True)
        ]

    groups = [point for group in comparison.groups if group.curve for point in line(plain(group.group), group.curve)]
    encoding = {
        "x": charts.axis("share", "kept share of every group, %", scale={"domain": [0, 100]}, axis=_TICKS),
        "y": charts.axis("overlap", "of it kept by both, %", scale={"domain": [0, 100]}, axis=_TICKS),
        "detail": {"field": "line"},
        "tooltip": [
            {"field": "line", "title": "group"},
            {"field": "share", "title": "kept share, %", "format": ".0f"},
            {"field": "overlap", "title": "kept by both, %", "format": ".1f"},
        ],
    }
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"share": 0, "overlap": 0}, {"share": 100, "overlap": 100}]},
            "mark": {"type": "line", "color": charts.SOFT, "strokeDash": [3, 4], "strokeWidth": 1},
            "encoding": {name: encoding[name] for name in "xy"},
        }
    ]
    if len(comparison.groups) > 1:
        layers.append(
            {
                "data": {"values": groups},
                "mark": {"type": "line", "color": charts.REST, "strokeWidth": 1.25, "tooltip": True},
                "encoding": encoding,
            }
        )
    layers.append(
        {
            "data": {"values": line("all groups" if len(comparison.groups) > 1 else "", comparison.curve)},
            "mark": {"type": "line", "strokeWidth": 2.25, "tooltip": True},
            "encoding": encoding,
        }
    )
    return charts.chart("Share of the kept windows that both runs keep, by the share kept", height=300, layer=layers)


def rank_chart(comparison: Comparison, x: str, y: str, height: int) -> dict[str, Any]:
    """The ranks in both runs as a heat map.

    Args:
        x, y: titles, with units.
    """
    step = 100 / BINS
    cells = [
        {"x": i * step, "x2": (i + 1) * step, "y": j * step, "y2": (j + 1) * step, "n": count}
        for i, row in enumerate(comparison.heat)
        for j, count in enumerate(row)
        if count
    ]
    chart = charts.heat_map("Windows by their rank in both runs", cells, x=x, y=y, height=height)
    for axis in "xy":
        chart["encoding"][axis]["axis"] = _TICKS
    return chart
