"""How scores, measures and places are distributed, as small summaries of a ranking: what a report shows of it.

Each function asks the tables of `longsift.ranking` one question, whose answer has a bounded size for any number of
windows. No sum is one of floats: the same ranking gives the same answers on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BEYOND = 0.002  # share of the values that the bins' range leaves out at each end; the outermost bins hold them


@dataclass(frozen=True)
class Histogram:
    """Counts of a group's scores in equal bins between `low` and `high`.

    Attributes:
        counts: windows.
        kept: those of them that are kept.
        behind: those of them that stand behind for an overlap.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    kept: tuple[int, ...]
    behind: tuple[int, ...]


@dataclass(frozen=True)
class Sketch:
    """What a group keeps at each of the shares 1/steps, 2/steps, … 1, exactly.

    A share i/steps keeps ceil(i · windows / steps) windows. The entries are the steps at which windows come in, in
    order: what is kept at a share is the sum of the entries up to its step.

    Attributes:
        steps: from 1 to the number of steps.
        windows, tokens: that come in at each.
        cuts: lowest score of all windows that are kept then.
    """

    steps: tuple[int, ...]
    windows: tuple[int, ...]
    tokens: tuple[int, ...]
    cuts: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """Windows whose two quantities lie in [x, x2) and [y, y2), and how many of them are kept."""

    x: float
    x2: float
    y: float
    y2: float
    windows: int
    kept: int


@dataclass(frozen=True)
class Failure:
    """A window that was not scored; `shard` and `row` say where it stands in the windows table."""

    shard: str
    row: int
    window_id: str


def histograms(database: Any, groups: Sequence[str], low: float, high: float, bins: int) -> dict[str, Histogram]:
    """Histograms of the scores of `groups`, which have measured windows; all scores are from `low` to `high`."""
    rows = database.execute(
        """SELECT "group", least(floor((score - ?) / ? * ?), ?)::INTEGER AS bin, count(*),
                  count(*) FILTER (rank <= k), count(*) FILTER (behind)
           FROM ranked JOIN cuts USING ("group") GROUP BY ALL""",
        [low, high - low, bins, bins - 1],
    ).fetchall()
    counts = {group: ([0] * bins, [0] * bins, [0] * bins) for group in groups}
    for group, index, *found in rows:
        for part, count in zip(counts[group], found, strict=True):
            part[index] = count
    return {group: Histogram(low, high, *map(tuple, parts)) for group, parts in counts.items()}


def sketches(database: Any, apart: Sequence[str], steps: int) -> dict[str | None, Sketch]:
    """Sketches of the groups `apart`, and one of all others together under None, which has no cuts."""
    rows = database.execute(
        """SELECT if(list_contains(?, "group"::VARCHAR), "group"::VARCHAR, NULL) AS name,
                  (rank - 1) * ? // windows + 1 AS step, count(*), sum(n_tokens)::BIGINT, min(score)
           FROM ranked JOIN summary USING ("group") GROUP BY ALL ORDER BY name NULLS LAST, step""",
        [list(apart), steps],
    ).fetchall()
    found: dict[str | None, list[tuple[int, int, int, float]]] = {group: [] for group in apart}
    for name, step, windows, tokens, lowest in rows:
        entries = found.setdefault(name, [])
        cut = min(lowest, entries[-1][3]) if entries else lowest  # those behind may score higher than those before
        entries.append((step, windows, tokens, cut))
    return {
        name: Sketch(
            steps=tuple(entry[0] for entry in entries),
            windows=tuple(entry[1] for entry in entries),
            tokens=tuple(entry[2] for entry in entries),
            cuts=() if name is None else tuple(entry[3] for entry in entries),
        )
        for name, entries in found.items()
    }


def load_extents(database: Any, files: Sequence[Path]) -> None:
    """Table `extents`, whose rowid is the place as in `scored`: where a window lies, and how long its document is.

    A document is taken to end with its last window. The score files have the column `start`.
    """
    database.execute(
        """CREATE TEMP TABLE IF NOT EXISTS places AS
           SELECT hash(doc_id, "group") AS document, start FROM read_parquet(?)""",
        [[str(path) for path in files]],
    )
    database.execute(
        """CREATE TEMP TABLE IF NOT EXISTS extents AS
           SELECT ranked.place, start, max(start + n_tokens) OVER (PARTITION BY document) AS length
           FROM ranked JOIN places ON places.rowid = place WHERE start IS NOT NULL"""
    )


def depths(database: Any, bins: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Where in their documents windows lie: the middle of a window, from 0 (first token) to 1 (last).

    Returns:
        Windows and kept windows by bin, and the number of windows left out, since they are all of their document.
    """
    rows = database.execute(
        """SELECT CASE WHEN extents.length > n_tokens
                       THEN least(floor((start + n_tokens / 2) / extents.length * ?), ?)::INTEGER END AS bin,
                  count(*), count(*) FILTER (rank <= k)
           FROM extents JOIN ranked USING (place) JOIN cuts USING ("group") GROUP BY ALL""",
        [bins, bins - 1],
    ).fetchall()
    counts, kept, whole = [0] * bins, [0] * bins, 0
    for index, count, kept_count in rows:
        if index is None:
            whole = count
        else:
            counts[index], kept[index] = count, kept_count
    return tuple(counts), tuple(kept), whole


def cells(database: Any, x: str, y: str, bins: int, *, log_x: bool = False) -> list[Cell]:
    """Windows by two quantities, in bins × bins equal bins; those that are not empty, in order.

    Args:
        x, y: columns, such as c0, c1 and score, or length, where `load_extents` was called.
        log_x: bins that are equal in the logarithm of `x`.
    """
    lengths = "JOIN extents USING (place)" if "length" in (x, y) else ""
    source = f"""(SELECT {f"log10({x})" if log_x else x} AS x, {y} AS y, rank <= k AS kept
                  FROM ranked JOIN cuts USING ("group") JOIN scored ON scored.rowid = place {lengths})"""
    low_x, high_x, low_y, high_y = database.execute(
        f"""SELECT quantile_disc(x, {_BEYOND}), quantile_disc(x, {1 - _BEYOND}),
                   quantile_disc(y, {_BEYOND}), quantile_disc(y, {1 - _BEYOND}) FROM {source}"""
    ).fetchone()
    if low_x is None:
        return []
    low_x, high_x = _widened(low_x, high_x)
    low_y, high_y = _widened(low_y, high_y)
    step_x, step_y = (high_x - low_x) / bins, (high_y - low_y) / bins
    rows = database.execute(
        f"""SELECT greatest(0, least(floor((x - ?) / ?), ?))::INTEGER AS i,
                   greatest(0, least(floor((y - ?) / ?), ?))::INTEGER AS j, count(*), count(*) FILTER (kept)
            FROM {source} GROUP BY ALL ORDER BY i, j""",
        [low_x, step_x, bins - 1, low_y, step_y, bins - 1],
    ).fetchall()

    def edge(number: int) -> float:
        value = low_x + number * step_x
        return float(10**value if log_x else value)

    return [
        Cell(edge(i), edge(i + 1), low_y + j * step_y, low_y + (j + 1) * step_y, windows, kept)
        for i, j, windows, kept in rows
    ]


def failures(database: Any, files: Sequence[Path], reasons: Sequence[str], most: int) -> dict[str, list[Failure]]:
    """The first windows that were not scored for each of `reasons`, in order, at most `most` of each."""
    rows = database.execute(
        """SELECT reason, filename, file_row_number, window_id FROM (
               SELECT *, row_number() OVER (PARTITION BY reason ORDER BY filename, file_row_number) AS number
               FROM (SELECT reason, filename, file_row_number, window_id
                     FROM read_parquet(?, filename = true, file_row_number = true)
                     WHERE status <> 'ok' AND list_contains(?, reason)))
           WHERE number <= ? ORDER BY ALL""",
        [[str(path) for path in files], list(reasons), most],
    ).fetchall()
    found: dict[str, list[Failure]] = {}
    for reason, file, row, window_id in rows:
        found.setdefault(reason, []).append(Failure(Path(file).stem, row, window_id))
    return found


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that has a width."""
    return (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
