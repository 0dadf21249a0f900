"""The page of one window: values for `inspect.html.jinja`, in which `inspect.js` draws the map.

The cells are drawn on a canvas, of bytes: as Vega-Lite's marks the 32,896 of one map of 32,768 tokens are a megabyte of
JSON and were measured to take Chromium 1.0 to 1.5 s each time another layer is chosen, where the canvas takes 0.1 s.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from longsift import __version__
from longsift.inspection.maps import LEVELS, SMALLEST, DependencyMap, quantise
from longsift.inspection.subjects import Subject
from longsift.methods.longattn import far_distance
from longsift.report.charts import CUT, KEPT, SOFT, axis, chart
from longsift.report.rendering import render
from longsift.report.words import number

HEAD_BYTES = 600_000  # of the maps of single heads, before base64; with more of them the page goes without
_LAYER_BYTES = 1_100_000  # of the maps of layers; with more of them some are left out
_TICKS = 8  # of an axis of the map, about
# The lines of the chart
CHOSEN, FIRST, FLAT = "layer chosen above, by passage", "first layer, by token (LongAttn)", "evenly spread attention"


def triangle(spans: int) -> int:
    """Cells of a map: pairs of a span with one that is not after it."""
    return spans * (spans + 1) // 2


def render_page(
    subject: Subject,
    found: DependencyMap,
    texts: list[str],
    calculator: dict[str, Any],
    *,
    far: int,
    decoded: bool,
) -> str:
    """The page of a window that was measured.

    Args:
        texts: what precedes the first span, and the text of each span.
        calculator: as its `describe()` says.
        far: spans from which on context counts as far, where the page begins.
        decoded: the texts were made from token ids.
    """
    n = found.n_spans
    shown = _shown_layers(found)
    starts = found.starts().tolist()
    return render(
        "inspect.html.jinja",
        subject=subject,
        facts=_facts(subject, found, calculator),
        map=found,
        shown=shown,
        heads=max((len(each) for each in found.heads.values()), default=0),
        fars=[spans for power in range(12) if (spans := 2**power) <= max(n // 2, 1)],
        far=far,
        ticks=list(_ticks(found)),
        before=texts[0],
        passages=list(zip(starts, texts[1:], strict=True)),
        decoded=decoded,
        curve=_curve_chart(found),
        distance=far_distance(found.length),
        data={
            "spans": n,
            "span": found.span,
            "starts": starts,
            "levels": LEVELS,
            "smallest": SMALLEST,
            "maps": dict(_maps(found, shown)),
            "chosen": CHOSEN,
            "quarter": math.ceil(far_distance(found.length) / found.span),
        },
        version=__version__,
    )


def _facts(subject: Subject, found: DependencyMap, calculator: dict[str, Any]) -> dict[str, str]:
    revision = calculator["revision"]
    facts = {
        **subject.facts,
        "Tokens": f"{found.length:,} in {found.n_spans:,} passages of {found.span:,}",
        "Calculator": calculator["model"] + (f" @ {revision[:12]}" if revision else ""),
        "Layers": ", ".join(map(str, found.layers)),
    }
    if found.curve:
        facts["Dependency strength"] = f"{number(found.curve.strength)} (LongAttn)"
    facts["Computed in"] = f"{calculator['dtype']} on {calculator['device']}"
    return facts


def _shown_layers(found: DependencyMap) -> tuple[int, ...]:
    """The layers whose own maps are on the page: all, or as many as fit, evenly spaced."""
    most = max(_LAYER_BYTES // triangle(found.n_spans), 1)
    if len(found.layers) <= most:
        return found.layers
    places = np.linspace(0, len(found.layers) - 1, most).round().astype(int)
    return tuple(found.layers[i] for i in places)


def _maps(found: DependencyMap, shown: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """The lower triangles of all maps, row by row, as bytes in base64, by "mean", "max", "LAYER" and "LAYER.HEAD"."""
    below = np.tril_indices(found.n_spans)

    def packed(shares: npt.NDArray[np.float32]) -> str:
        return base64.b64encode(quantise(shares[below]).tobytes()).decode("ascii")

    if len(found.layers) > 1:
        yield "mean", packed(found.mean())
        yield "max", packed(found.shares.max(0))
    for layer in shown:
        yield str(layer), packed(found.shares[found.layers.index(layer)])
    for layer, heads in found.heads.items():
        for head, shares in enumerate(heads):
            yield f"{layer}.{head}", packed(shares)


def _ticks(found: DependencyMap) -> Iterator[tuple[float, str]]:
    """Places on an axis of the map in percent, and the token that is there."""
    covered = found.span * found.n_spans
    lead = found.length - covered
    for token in range(0, found.length + 1, _step(found.length)):
        if token >= lead:
            yield 100 * (token - lead) / covered, f"{token:,}"


def _step(length: int) -> int:
    """Tokens between two ticks of an axis over a window."""
    return int(2 ** round(math.log2(length / _TICKS)))


def _curve_chart(found: DependencyMap) -> dict[str, Any]:
    """Far mass by position; the page's script adds the line of the map that is chosen, to the data "lines"."""
    length, distance = found.length, far_distance(found.length)
    positions = found.curve.positions if found.curve else found.starts() + found.span / 2
    lines = {FLAT: np.maximum(positions - distance + 1, 0) / (positions + 1)}
    if found.curve:
        lines[FIRST] = found.curve.mass
    values = [
        {"position": position, "share": round(100 * share, 3), "of": of}
        for of, shares in lines.items()
        for position, share in zip(positions.tolist(), shares.tolist(), strict=True)
    ]
    kinds = [CHOSEN, *([FIRST] if found.curve else []), FLAT]
    colours, dashes = {CHOSEN: KEPT, FIRST: CUT, FLAT: SOFT}, {CHOSEN: [1, 0], FIRST: [1, 0], FLAT: [2, 3]}
    return chart(
        f"Share of attention that goes to tokens at least {distance:,} back, by position in the window.",
        height=240,
        data={"name": "lines", "values": values},
        mark={"type": "line", "interpolate": "linear"},
        encoding={
            "x": axis(
                "position",
                "position of the token that attends (tokens)",
                scale={"domain": [0, length]},
                axis={"values": list(range(0, length + 1, _step(length)))},
            ),
            "y": axis("share", "far attention (%)", scale={"zero": True}),
            "color": {
                "field": "of",
                "type": "nominal",
                "title": None,
                "scale": {"domain": kinds, "range": [colours[kind] for kind in kinds]},
                "legend": {"symbolType": "stroke", "symbolStrokeWidth": 2, "labelLimit": 0},
            },
            "strokeDash": {
                "field": "of",
                "type": "nominal",
                "scale": {"domain": kinds, "range": [dashes[kind] for kind in kinds]},
            },
        },
    )
