"""Charts as Vega-Lite specifications: one theme for all pages, and builders for the charts that several pages have.

Colours are the CSS variables of `base.html.jinja`, written `var(--kept)`: the charts are drawn as SVG, where the
browser resolves them, so that a page that turns dark or is printed needs no drawing anew. Scales therefore never mix
colours: a heat map varies the opacity of one. `charts.js` draws; every chart fills its element's width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

KEPT, REST, CUT, INK, SOFT, LINE = (f"var(--{name})" for name in ("kept", "rest", "cut", "ink", "soft", "line"))
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

_COUNT = "datum.value < 1e4 ? format(datum.value, ',') : format(datum.value, '~s')"


def theme() -> dict[str, Any]:
    """Vega-Lite's `config` of all charts."""
    text = {"labelColor": SOFT, "titleColor": SOFT, "labelFontSize": 11, "titleFontSize": 11.5, "titleFontWeight": 400}
    return {
        "font": _FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "axis": text
        | {"domainColor": LINE, "tickColor": LINE, "gridColor": LINE, "gridDash": [1, 3], "labelFlush": True},
        "axisX": {"grid": False, "titlePadding": 6, "tickSize": 4, "labelSeparation": 6},
        "axisY": {"domain": False, "ticks": False, "tickCount": 4, "titlePadding": 8},
        "legend": text | {"orient": "top", "symbolType": "square", "symbolStrokeWidth": 0, "offset": 6},
        "bar": {"color": REST},
        "rect": {"color": KEPT},
        "line": {"color": KEPT, "strokeWidth": 1.75},
        "point": {"color": KEPT, "filled": True, "size": 30},
        "rule": {"color": CUT, "strokeWidth": 1.5},
        "text": {"color": SOFT, "fontSize": 11},
    }


def chart(description: str, *, height: int = 190, **parts: Any) -> dict[str, Any]:
    """A whole specification.

    Args:
        description: what the chart shows, for those who do not see it.
        height: in pixels; the width is that of the chart's element.
        parts: the rest of the specification: data, mark, encoding, layer, params, …
    """
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "config": theme(),
        **parts,
    }


def axis(field: str, title: str | list[str], **further: Any) -> dict[str, Any]:
    """The encoding of a quantity, with a title that names its unit."""
    return {"field": field, "type": "quantitative", "title": title, **further}


def histogram(
    description: str,
    bars: Sequence[Mapping[str, float]],
    *,
    x: str,
    count: str = "windows",
    domain: tuple[float, float] | None = None,
    height: int = 190,
) -> dict[str, Any]:
    """Counts by bin, those of kept windows in their own colour, and a line at the cut.

    The page's script may give other values to the data sets `bars` and `cut` (of one row {x}, or of none).

    Args:
        bars: `x`, `x2` (a bin's edges), `n` (its count) and `kept` (of these) of each.
        x, count: titles, with units.
        domain: of the bins; that of the bars by default.
    """
    scale = {"zero": False, "nice": False} | ({} if domain is None else {"domain": domain})
    ticks = {"tickCount": 6, "format": _format([bar["x2"] for bar in bars])}
    edges = {"x": axis("x", wrap(x, 32), bin={"binned": True}, scale=scale, axis=ticks), "x2": {"field": "x2"}}
    counted = {"labelExpr": _COUNT, "tickMinStep": 1}
    tooltip = [
        {"field": "n", "title": count, "format": ","},
        {"field": "kept", "title": "selected", "format": ","},
        {"field": "x", "title": f"{x}, from", "format": ".4~g"},
        {"field": "x2", "title": "to", "format": ".4~g"},
    ]
    gap = {"type": "bar", "binSpacing": 0.6, "tooltip": True}
    return chart(
        description,
        height=height,
        datasets={"bars": list(bars), "cut": []},
        data={"name": "bars"},
        layer=[
            {"mark": gap, "encoding": {**edges, "y": axis("n", count, axis=counted), "tooltip": tooltip}},
            {"mark": {**gap, "color": KEPT}, "encoding": {**edges, "y": axis("kept", count), "tooltip": tooltip}},
            {"data": {"name": "cut"}, "mark": "rule", "encoding": {"x": {"field": "x", "type": "quantitative"}}},
        ],
    )


def heat_map(
    description: str,
    cells: Sequence[Mapping[str, float]],
    *,
    x: str,
    y: str,
    count: str = "windows",
    log_x: bool = False,
    height: int = 190,
) -> dict[str, Any]:
    """Binned counts of two quantities: the more windows, the denser a cell.

    Args:
        cells: those that are not empty, each with `x`, `x2`, `y`, `y2` (its edges) and `n` (its count); and with
            `kept`, how many of these are, the colour says whether most are.
        x, y, count: titles, with units.
        log_x: a logarithmic axis.
    """
    scale = {"zero": False, "nice": False}
    ticks = {"format": _format([cell["x2"] for cell in cells]), "tickCount": 5}
    selected = [{"field": "kept", "title": "selected", "format": ","}] if any("kept" in cell for cell in cells) else []
    return chart(
        description,
        height=height,
        data={"values": list(cells)},
        mark={"type": "rect", "tooltip": True},
        encoding={
            "x": axis("x", wrap(x, 40), scale={"type": "log", "nice": False} if log_x else scale, axis=ticks),
            "x2": {"field": "x2"},
            "y": axis("y", wrap(y, 28), scale=scale, axis={"format": _format([cell["y2"] for cell in cells])}),
            "y2": {"field": "y2"},
            "fill": {"condition": {"test": "datum.kept * 2 < datum.n", "value": REST}, "value": KEPT},
            "opacity": axis("n", count, scale={"type": "log", "domainMin": 0.5, "range": [0.15, 1]}, legend=None),
            "tooltip": [
                {"field": "n", "title": count, "format": ","},
                *selected,
                {"field": "x", "title": f"{x}, from", "format": ".4~g"},
                {"field": "x2", "title": "to", "format": ".4~g"},
                {"field": "y", "title": f"{y}, from", "format": ".4~g"},
                {"field": "y2", "title": "to", "format": ".4~g"},
            ],
        },
    )


def _format(values: Sequence[float]) -> str:
    """A format of d3 for the ticks of an axis up to the largest of some values."""
    largest = max(map(abs, values), default=1)
    return ".2~e" if 0 < largest < 1e-3 else "~s" if largest >= 1e4 else ".4~g"


def wrap(title: str, width: int) -> list[str]:
    """A title in lines, for an axis that is short."""
    return textwrap.wrap(title, width)
