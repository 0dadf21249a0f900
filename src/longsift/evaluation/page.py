"""The page of an evaluation: tables of AUC and a map over layers and heads, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from longsift.tables import publish

SHADES = 20  # steps of colour from AUC 0 to 1, one more than these
_CELL, _LEFT, _TOP, _BOTTOM = 14, 40, 8, 34
_CHART = (320, 170)
_KINDS = {
    "mixed": "segments exchanged between documents",
    "shuffled": "its own segments in another order",
    "far-half": "first half from another document",
    "pieces": "short pieces of many documents",
    "degenerate": "generated text of all kinds",
}
_STATISTICS = {
    "far": "mass on far spans, without the sink",
    "weighted": "mass weighted by distance",
    "sink": "mass on the first span",
    "spread": "deviation of the mass over far spans",
    "variation": "that deviation over its mean",
    "peak": "largest mass on one far span",
    "near": "mass on the own span",
    "unsteady": "deviation of the far mass over the window",
    "strength": "LongAttn's dependency strength, first layer",
    "variance": "LongAttn's variance, first layer",
    "cds": "LADM as published",
    "cds_dense": "LADM of every pair of spans, causal denominator",
}


@dataclass(frozen=True)
class Map:
    """AUCs of one statistic of every head, as squares in a box."""

    kind: str
    width: int
    height: int
    cells: list[tuple[int, int, int, str]]  # x, y, shade, what it is
    heads: list[tuple[int, str]]  # x and label
    layers: list[tuple[int, str]]  # y and label
    best: float


@dataclass(frozen=True)
class Chart:
    """AUC over layers as lines in a box; the ticks are places and labels."""

    kind: str
    lines: list[tuple[str, str, list[tuple[float, float, str]]]]  # name, points of the line, (x, y, title) of each
    layers: list[tuple[float, str]]
    aucs: list[tuple[float, str]]


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `evaluate` gave.

    Args:
        result: of `longsift.evaluation.evaluate.evaluate`.
        path: of the HTML file, visible whole or not at all.
    """
    from longsift.evaluation.evaluate import DEGENERATE, MEAN, SCORES

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    scores, of_mean = result["scores"], [row for row in result["scores"] if row["group"] == MEAN]
    kinds = list(dict.fromkeys(row["kind"] for row in scores))
    generated = [kind for kind in kinds if kind.startswith(f"{DEGENERATE}/")]
    whole = [kind for kind in kinds if kind not in generated]
    cells = {(row["score"], row["kind"], row["group"]): row for row in scores}
    html = page.render(
        result=result,
        facts=list(_facts(result)),
        shades=SHADES,
        shade=shade,
        mean=MEAN,
        describe=lambda kind: _KINDS.get(kind, f"the corpus' own {kind.partition('/')[2]}"),
        scores=list(dict.fromkeys(row["score"] for row in of_mean)),
        meaning=SCORES,
        groups=list(dict.fromkeys(row["group"] for row in scores)),
        kinds=whole,
        generated=generated,
        cells=cells,
        charts=[_chart(kind, result["layers"]) for kind in whole] if result["layers"] else [],
        maps=[
            (
                name,
                _STATISTICS[name],
                [_map(kind, rows) for kind in whole if (rows := _of(result["heads"], kind, name))],
            )
            for name in dict.fromkeys(row["statistic"] for row in result["heads"])
        ],
    )
    with publish(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def shade(auc: float) -> int:
    """The step of colour of an AUC."""
    return round(auc * SHADES)


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    calculator, options = result["calculator"], result["options"]
    revision = calculator.get("revision")
    yield "Calculator", calculator["model"] + (f" @ {revision[:12]}" if revision else "")
    yield "On", f"{calculator['device']}, {calculator['dtype']}"
    yield "Window", f"{options['window']:,} tokens"
    yield "Segment and span", f"{options['segment']:,} and {options['span']:,} tokens"
    yield "Coherent", ", ".join(f"{group} {count}" for group, count in result["windows"]["coherent"].items())
    yield "Controls", f"{sum(result['windows']['controls'].values()):,} windows"
    yield "Calibration", result["calibration"] or "none"
    yield "Input", ", ".join(options["inputs"])
    yield "Seed", str(options["seed"])
    yield "Made with", f"longsift {result['longsift']}"


def _of(rows: Sequence[Mapping[str, Any]], kind: str, statistic: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["kind"], row["statistic"]) == (kind, statistic)]


def _map(kind: str, rows: Sequence[Mapping[str, Any]]) -> Map:
    layers = sorted({row["layer"] for row in rows})
    heads = 1 + max(row["head"] for row in rows)
    width, height = max(_LEFT + heads * _CELL + 4, 90), _TOP + len(layers) * _CELL + _BOTTOM
    cells = []
    for row in rows:
        x, y = _LEFT + row["head"] * _CELL, _TOP + layers.index(row["layer"]) * _CELL
        title = f"layer {row['layer']}, head {row['head']}: {row['auc']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        cells.append((x, y, shade(row["auc"]), title))
    middle = _CELL // 2
    return Map(
        kind=kind,
        width=width,
        height=height,
        cells=cells,
        heads=[(_LEFT + i * _CELL + middle, str(i)) for i in _ticks(heads)],
        layers=[(_TOP + i * _CELL + middle + 4, str(layers[i])) for i in _ticks(len(layers))],
        best=max(row["auc"] for row in rows),
    )


def _chart(kind: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    from longsift.evaluation.evaluate import MEAN

    width, height = _CHART
    layers = sorted({row["layer"] for row in rows})

    def x(layer: int) -> float:
        return round(_LEFT + 6 + (width - _LEFT - 16) * layers.index(layer) / max(len(layers) - 1, 1), 1)

    def y(auc: float) -> float:
        return round(_TOP + (height - _TOP - _BOTTOM) * (1 - auc), 1)

    lines = []
    for statistic in dict.fromkeys(row["statistic"] for row in rows):
        found = [row for row in _of(rows, kind, statistic) if row["group"] == MEAN]
        points = [
            (x(row["layer"]), y(row["auc"]), f"{statistic} of layer {row['layer']}: {row['auc']:.2f}") for row in found
        ]
        lines.append((statistic, " ".join(f"{px},{py}" for px, py, _ in points), points))
    return Chart(
        kind=kind,
        lines=lines,
        layers=[(x(layers[i]), str(layers[i])) for i in _ticks(len(layers))],
        aucs=[(y(auc), f"{auc:g}") for auc in (0.0, 0.5, 1.0)],
    )


def _ticks(count: int) -> range:
    """Which of so many places get a label: all of a few, else every second, fourth, …"""
    step = 1
    while count / step > 10:
        step *= 2
    return range(0, count, step)
