"""The report of a run: one HTML page that needs nothing else, from the manifest, the tables and the choice.

Python here prepares plain values and geometry; `report.html.jinja` lays them out and escapes every one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from longsift.distributions import Histogram
from longsift.errors import OutputError
from longsift.report.rendering import render
from longsift.report.words import scaled, share, tick, tokens
from longsift.selection import Choice, GroupChoice, RankedWindow
from longsift.tables import parquet_files, publish

_GROUPS = 24  # with a chart and windows of their own; the table has all
_REASONS = 20
_FEWEST_BINS, _MOST_BINS = 16, 60  # of a histogram
_EXAMPLES = 3  # of each reason, and of best and worst windows
_HEAD, _TAIL = 1300, 700  # characters of a window's text that are shown


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
    shown = sorted(choice.groups, key=lambda group: (-group.tokens, group.group))[:_GROUPS]
    shown.sort(key=lambda group: group.group)
    most = max((group.windows for group in shown), default=0)
    histograms = choice.histograms(bins=min(max(2 * math.isqrt(most), _FEWEST_BINS), _MOST_BINS))
    shelves = [_shelves(choice, group) for group in shown]
    texts = _texts(windows, [window for shelf in shelves for _, listed in shelf for window in listed])
    html = render(
        "report.html.jinja",
        choice=choice,
        facts=list(_facts(manifest, choice)),
        funnel=_funnel(manifest, choice),
        unit=_unit(choice),
        columns=[term.column for term in choice.rule.terms],
        panels=[
            {
                "group": group,
                "chart": _chart(histograms[group.group], group.cut) if group.windows else None,
                "shelves": shelf,
            }
            for group, shelf in zip(shown, shelves, strict=True)
        ],
        texts=texts,
        reasons=_quarantine(windows.parent / "quarantine"),
        failures=list(manifest["scores"].get("reasons", {}).items())[:_REASONS],
    )
    with publish(out / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out / "report.html"


# --- facts and counts -----------------------------------------------------------------------------------


def _facts(manifest: Mapping[str, Any], choice: Choice) -> Iterator[tuple[str, str]]:
    windows, scores, identity = manifest["windows"], manifest["scores"], manifest["selected"]["identity"]
    calculator, counts = scores["calculator"], scores["counts"]
    parameters = "".join(
        f", {key} {value}" for key, value in identity["parameters"].items() if value is not None and value is not False
    )
    yield "Method", identity["method"] + parameters
    yield "Score", choice.rule.describe()
    revision = calculator.get("revision")
    yield "Calculator", calculator["model"] + (f" @ {revision[:12]}" if revision else "")
    yield "Window", f"{windows['length']:,} tokens" if windows.get("length") else "as given"
    yield "Groups by", windows["identity"].get("group_by") or "source, where present"
    yield "Kept", _request(choice)
    yield "Scored", datetime.fromtimestamp(scores["finished"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield "On", f"{calculator['device']}, {calculator['dtype']}"
    if counts["seconds"]:
        yield "Speed", f"{counts['tokens'] / counts['seconds']:,.0f} tokens a second"
    inputs = windows["identity"].get("inputs", [])
    if inputs:
        size = sum(size or 0 for _, size, *_ in inputs)
        others = f" and {len(inputs) - 1:,} more" if len(inputs) > 1 else ""
        yield "Input", f"{inputs[0][0]}{others}, {scaled(size, 'B')}"
    yield "Made with", f"longsift {manifest['longsift']}"


def _request(choice: Choice) -> str:
    text = f"{share(choice.keep)} of every group, rounded up" if choice.keep is not None else ""
    if choice.budget is not None:
        text = f"{tokens(choice.budget)} tokens"
    if choice.mix is not None:
        text = f"{text.replace(' of every group, rounded up', ' of all tokens')}: " + ", ".join(
            f"{group} {share(part)}" for group, part in choice.mix.items()
        )
    return text


@dataclass(frozen=True)
class _Stage:
    """One line of the funnel; `lost` marks what does not go on."""

    label: str
    count: int
    tokens: int | None
    share: float
    lost: bool = False


def _funnel(manifest: Mapping[str, Any], choice: Choice) -> list[tuple[str, list[_Stage]]]:
    counts = manifest["windows"]["counts"]
    rows = counts["documents"] + counts["bad_rows"]
    cut = counts.get("windows_before_sample", counts["windows"])

    def documents(label: str, count: int, tokens: int | None = None, lost: bool = False) -> _Stage:
        return _Stage(label, count, tokens, count / rows if rows else 0.0, lost)

    def windows(label: str, count: int, tokens: int | None = None, lost: bool = False) -> _Stage:
        return _Stage(label, count, tokens, count / cut if cut else 0.0, lost)

    sampled = [windows("Drawn as a sample", counts["windows"], counts["tokens"])] if cut != counts["windows"] else []
    return [
        (
            "Documents",
            [
                documents("Read", rows),
                documents("Quarantined", counts["bad_rows"], lost=True),
                documents("Too short", counts["too_short"], counts.get("too_short_tokens"), lost=True),
                documents("Cut into windows", counts["documents"] - counts["too_short"]),
            ],
        ),
        (
            "Windows",
            [
                windows("Cut", cut, None if sampled else counts["tokens"]),
                *sampled,
                windows("Failed", choice.failed, lost=True),
                *([windows("Same tokens as another", choice.duplicates, lost=True)] if choice.duplicates else []),
                windows("Scored", choice.windows, choice.tokens),
                *([windows("Overlap a better one", choice.passed_over, lost=True)] if choice.passed_over else []),
                windows("Selected", choice.kept, choice.kept_tokens),
            ],
        ),
    ]


def _unit(choice: Choice) -> str:
    if choice.rule.normalize == "zscore":
        return "standard deviations within the group"
    if choice.rule.normalize == "minmax":
        return "share of the group's range"
    return " + ".join(term.column for term in choice.rule.terms if term.weight)


def _quarantine(folder: Path) -> list[dict[str, Any]]:
    """The commonest reasons, each with its count and first examples."""
    paths = [str(path) for path in parquet_files(folder)]
    if not paths:
        return []
    with duckdb.connect() as database:
        rows = database.execute(
            """SELECT reason, file, row, excerpt, number, total FROM (
                   SELECT *, row_number() OVER (PARTITION BY reason ORDER BY file, row) AS number,
                          count(*) OVER (PARTITION BY reason) AS total
                   FROM read_parquet(?))
               WHERE number <= ? ORDER BY total DESC, reason, number LIMIT ?""",
            [paths, _EXAMPLES, _EXAMPLES * _REASONS],
        ).fetchall()
    reasons: dict[str, dict[str, Any]] = {}
    for reason, file, row, excerpt, _, total in rows:
        entry = reasons.setdefault(reason, {"reason": reason, "count": total, "examples": []})
        entry["examples"].append({"file": file, "row": row, "excerpt": excerpt})
    return list(reasons.values())[:_REASONS]


# --- windows --------------------------------------------------------------------------------------------


def _shelves(choice: Choice, group: GroupChoice) -> list[tuple[str, list[RankedWindow]]]:
    """Windows worth reading: the best, those on both sides of the cut, and the worst; none twice.

    Those that stand behind for an overlap are left out: their ranks do not go with their scores.
    """
    n, k = group.windows - group.behind, group.kept
    shelves = []
    after = 0
    for title, first, last in (
        ("Best", 1, _EXAMPLES),
        ("Around the cut", k - 1, k + 2),
        ("Worst", n - _EXAMPLES + 1, n),
    ):
        first, last = max(first, after + 1), min(last, n)
        if first <= last and not (title == "Around the cut" and k in (0, n)):
            shelves.append((title, choice.ranked(group.group, first, last)))
            after = last
    return shelves


@dataclass(frozen=True)
class _Text:
    """The beginning and end of a window's text, and how many characters between them are left out."""

    head: str
    tail: str
    left_out: int


def _texts(windows: Path, shown: Sequence[RankedWindow]) -> dict[tuple[str, int], _Text | None]:
    """Texts by shard and row; None for windows that were given as token ids."""
    rows: dict[str, dict[int, str]] = {}
    for window in shown:
        rows.setdefault(window.shard, {})[window.row] = window.window_id
    texts: dict[tuple[str, int], _Text | None] = {}
    with duckdb.connect() as database:
        for shard, wanted in rows.items():
            path = windows / f"{shard}.parquet"
            try:
                found = database.execute(
                    """SELECT file_row_number, window_id, length(text), left(text, ?), right(text, ?)
                       FROM read_parquet(?, file_row_number = true) WHERE list_contains(?, file_row_number)""",
                    [_HEAD + _TAIL, _TAIL, str(path), list(wanted)],
                ).fetchall()
            except duckdb.Error as error:
                raise OutputError(
                    f"{path} cannot be read ({error}); its scores were. Cut the windows again with --overwrite."
                ) from error
            if {row: window_id for row, window_id, *_ in found} != wanted:
                raise OutputError(
                    f"{path} does not hold the windows that were scored. Score them again with --overwrite."
                )
            for row, _, length, head, tail in found:
                texts[shard, row] = None if head is None else _excerpt(length, head, tail)
    return texts


def _excerpt(length: int, head: str, tail: str) -> _Text:
    if length <= _HEAD + _TAIL:
        return _Text(head, "", 0)
    return _Text(head[:_HEAD], tail, length - _HEAD - _TAIL)


# --- charts ---------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 20, 42


@dataclass(frozen=True)
class _Chart:
    """A histogram as coordinates in a box of `width` × `height`."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    bars: list[tuple[float, float, float, float, int]]  # x, width, top, top of the kept part, all in the box
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    cut: float | None
    cut_at_left: bool  # the line stands in the left half, so that its label goes to the right of it


def _chart(histogram: Histogram, cut: float | None) -> _Chart:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    span = histogram.high - histogram.low
    most = max(histogram.counts)
    y_ticks = [count for count in _ticks(0, most, 3) if count == int(count)]
    ceiling = max(most, y_ticks[-1])

    def x(score: float) -> float:
        return round(_LEFT + (right - _LEFT) * (score - histogram.low) / span, 2)

    def y(count: float) -> float:
        return round(bottom - (bottom - _TOP) * count / ceiling, 2)

    step = (right - _LEFT) / len(histogram.counts)
    bars = [
        (round(_LEFT + i * step, 2), round(step - 0.6, 2), y(count), y(kept), bottom)
        for i, (count, kept) in enumerate(zip(histogram.counts, histogram.kept, strict=True))
        if count
    ]
    line = None if cut is None else x(cut)
    return _Chart(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        bars=bars,
        x_ticks=[(x(score), tick(score)) for score in _ticks(histogram.low, histogram.high, 6)],
        y_ticks=[(y(count), tick(count)) for count in y_ticks],
        cut=line,
        cut_at_left=line is not None and line < (_LEFT + right) / 2,
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between `low` and `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
