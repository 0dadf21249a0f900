"""The report of a run: one HTML page that needs nothing else, from the manifest, the tables and the choice.

Python prepares plain values and charts; `report.html.jinja` lays them out and escapes every one; `report.js` draws the
charts and lets a reader move the share that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longsift.report import charts, content, costs
from longsift.report.agreement import agreement
from longsift.report.figures import figures
from longsift.report.maps import in_turn, small_maps
from longsift.report.rendering import render
from longsift.report.shelves import SNIPPET, all_windows, shelves, texts
from longsift.report.sketch import slider
from longsift.selection import Choice
from longsift.tables import publish

_GROUPS = 24  # with a chart and windows of their own; the table has more
_LISTED = 500  # groups in the tables
_FEWEST_BINS, _MOST_BINS = 16, 60  # of a histogram


def write_report(
    out: Path,
    manifest: Mapping[str, Any],
    choice: Choice,
    windows: Path,
    *,
    map_seconds: float = 0.0,
    against: Path | None = None,
) -> Path:
    """Write `out`/report.html and return its path.

    Args:
        out: the run's folder.
        manifest: of the run, its three stages finished (`longsift.shards.RunFolder.manifest`).
        choice: what is kept.
        windows: folder of the windows table; texts are read for the windows that the page shows, and the
            quarantine is looked for beside it.
        map_seconds: for how long to measure dependency maps of those windows; maps of earlier reports are shown anyway.
        against: folder of another run over the same windows, to compare with.

    Raises:
        OutputError: the windows are not those that were scored, or cannot be read; nothing to compare with.
    """
    by_size = sorted(choice.groups, key=lambda group: (-group.tokens, group.group))
    shown = sorted(by_size[:_GROUPS], key=lambda group: group.group)
    most = max((group.windows for group in shown), default=0)
    histograms = choice.histograms(bins=min(max(2 * math.isqrt(most), _FEWEST_BINS), _MOST_BINS))
    shelf = {group.group: shelves(choice, group) for group in shown}
    unit = content.unit(choice)
    domain = next(((histogram.low, histogram.high) for histogram in histograms.values()), None)
    read = texts(windows, all_windows(shelf))  # which checks that they are those that were scored
    html = render(
        "report.html.jinja",
        choice=choice,
        facts=list(content.facts(manifest, choice)),
        manifest=content.manifest_text(manifest),
        command=content.command(out, manifest),
        funnel=content.funnel(manifest, choice),
        columns=[term.column for term in choice.rule.terms],
        shown=shown,
        others=sorted(by_size[_GROUPS:_LISTED], key=lambda group: group.group),
        unlisted=len(by_size[_LISTED:]),
        slider=slider(choice, shown, histograms),
        histogram=charts.histogram("Histogram of scores", [], x=f"score, {unit}", domain=domain),
        figures=figures(choice, unit),
        agreement=None if against is None else agreement(out, against, choice),
        shelves=shelf,
        texts=read,
        snippet=SNIPPET,
        most_groups=_LISTED,
        maps=small_maps(out, manifest, windows, in_turn(shelf.values()), map_seconds),
        reasons=content.quarantine(windows.parent / "quarantine"),
        failures=content.failures(manifest, choice),
        stages=costs.stages(manifest),
        projections=costs.projections(manifest),
        device=costs.device(manifest),
        speed=costs.speed(out),
    )
    with publish(out / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "report.html"
