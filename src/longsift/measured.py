"""What was measured, group by group, straight from the scores table: the end of `longsift score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from longsift.errors import OutputError
from longsift.ranking import column_name
from longsift.rules import ScoreRule
from longsift.tables import parquet_files

BINS = 12
_BEYOND = 0.005  # share of the windows that may lie beyond the bins at either end; the outer bins count them
_MEMORY = "2GB"


def measured_groups(scores: Path, rule: ScoreRule) -> dict[str, Any]:
    """How the rule's first measure, before any normalising, is distributed in every group.

    All groups have the same bins, since a method's measure has one unit.

    Args:
        scores: folder of the score files.
        rule: of the method that made them; of a list, the mean of its elements is taken.

    Returns:
        `measure`, the column's name; `low` and `high`, the outer edges of the bins (values beyond are counted in the
        first and last); `groups`, by name, each with `windows` and `tokens` measured, `failed` windows (where
        any has such), `mean`, `p10`, `median`, `p90` and `histogram`, counts in `BINS` equal bins. A group without a
        measured window has None and an empty histogram.

    Raises:
        OutputError: the score files cannot be read.
    """
    term = rule.terms[0]
    column = column_name(term.column)
    value = f"list_avg({column})" if term.each else column
    files = [str(path) for path in parquet_files(scores)]
    source = f"""(SELECT "group", n_tokens, coalesce(status = 'ok' AND isfinite({value}::DOUBLE), false) AS ok,
                         {value}::DOUBLE AS value FROM read_parquet($files))"""
    try:
        # One thread adds numbers in one order: the same means on every run.
        with duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "threads": "1"}) as database:
            low, high = database.execute(
                f"SELECT quantile_cont(value, $beyond), quantile_cont(value, 1 - $beyond) FROM {source} WHERE ok",
                {"files": files, "beyond": _BEYOND},
            ).fetchone()
            rows = database.execute(
                f"""SELECT "group", count(*) FILTER (ok) AS windows,
                           coalesce(sum(n_tokens) FILTER (ok), 0)::BIGINT AS tokens,
                           count(*) FILTER (NOT ok) AS failed, favg(value) FILTER (ok) AS mean,
                           quantile_cont(value, [0.1, 0.5, 0.9]) FILTER (ok) AS quantiles
                    FROM {source} GROUP BY "group" ORDER BY "group" """,
                {"files": files},
            ).fetchall()
            bins = {"low": low, "width": (high - low) / BINS or 1.0} if low is not None else {"low": 0.0, "width": 1.0}
            counts = database.execute(
                f"""SELECT "group", greatest(least(floor((value - $low) / $width), {BINS - 1}), 0)::INTEGER, count(*)
                    FROM {source} WHERE ok GROUP BY ALL""",
                {"files": files, **bins},
            ).fetchall()
    except duckdb.Error as error:
        raise OutputError(
            f"The scores in {scores} could not be read ({error}). Score again with --overwrite."
        ) from error
    any_failed = any(failed for _, _, _, failed, _, _ in rows)
    histograms: dict[str, list[int]] = {}
    for group, index, count in counts:
        histograms.setdefault(group, [0] * BINS)[index] = count
    return {
        "measure": term.column,
        "low": low,
        "high": high,
        "groups": [
            {
                "group": group,
                "windows": windows,
                "tokens": tokens,
                **({"failed": failed} if any_failed else {}),
                "mean": mean,
                **dict(zip(("p10", "median", "p90"), quantiles or [None] * 3, strict=True)),
                "histogram": histograms.get(group, []),
            }
            for group, windows, tokens, failed, mean, quantiles in rows
        ],
    }
