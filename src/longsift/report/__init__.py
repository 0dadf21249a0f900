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
from longsift.report.figures import figures
from longsift.report.rendering import render
from longsift.report.shelves import all_windows, shelves, texts
from longsift.report.sketch import slider
from longsift.selection import Choice
from longsift.tables import publish

_GROUPS = 24  # with a chart and windows of their own; the table has more
_LISTED = 1000  # groups in the table
_FEWEST_BINS, _MOST_BINS = 16, 60  # of a histogram


def write_report(out: Path, manifest: Mapping[str, Any], choice: Choice, windows: Path) -> Path:
    """Write `out`/report.html and return its path.

    Args:
        out: the run's folder.
        manifest: of the run, its three stages finished (`longsift.shards.RunFolder.manifest`).
        choice: what is kept.
        windows: folder of the windows table; texts are read for the windows that the page shows, and the
            quarantine is looked for beside it.

    Raises:
        OutputError: the windows are not those that were scored, or cannot be read.
    """
    by_size = sorted(choice.groups, key=lambda group: (-group.tokens, group.group))
    shown = sorted(by_size[:_GROUPS], key=lambda group: group.group)
    most = max((group.windows for group in shown), default=0)
    histograms = choice.histograms(bins=min(max(2 * math.isqrt(most), _FEWEST_BINS), _MOST_BINS))
    shelf = {group.group: shelves(choice, group) for group in shown}
    unit = content.unit(choice)
    domain = next(((histogram.low, histogram.high) for histogram in histograms.values()), None)
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
        shelves=shelf,
        texts=texts(windows, all_windows(shelf)),
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
