"""The ranking of a scores table, a step after the other, in DuckDB: bounded memory, and the same bits on every run.

A window's `place` is its row number over all score files, in their order. The tables, in the order of their making::

    scored    one row a window, whose rowid is its place: window_id, group, n_tokens, its measures, ok
              and, where asked for, document, start (for overlaps), ids_hash, copy (for duplicates)
    summary   one row a group: its counts, and the spread of every measure
    behind    place of every window that overlaps a better one
    ranked    every measured window: place, group, n_tokens, score, behind, rank
    cuts      how many windows, k, each group keeps: those of rank 1 … k

Only DuckDB's own order is relied upon where it is promised: rows of files read without a join keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from longsift.errors import OutputError, UsageError
from longsift.rules import ScoreRule

MIX_TOLERANCE = Fraction(1, 1_000_000)
# n_tokens counts the special tokens around a window and start does not: neighbours may seem to share so many.
_SPECIAL_TOKENS = 8
COLUMNS = ("window_id", "doc_id", "group", "n_tokens", "status")  # that score files must have, beside the rule's


@dataclass(frozen=True)
class Quota:
    """Tokens that one or several groups were to fill together.

    Attributes:
        groups: their names.
        share: of the total that was asked for.
        tokens: asked for.
        kept: tokens of the kept windows.
        shortfall: tokens that were asked for and that the groups do not have; 0 when windows are left over.
    """

    groups: tuple[str, ...]
    share: float
    tokens: int
    kept: int
    shortfall: int


def find_elements(database: Any, files: Sequence[Path], rule: ScoreRule) -> dict[int, list[str]]:
    """Columns for the elements of each list that is taken by element, by the term's place in the rule.

    Raises:
        OutputError: windows have lists of several lengths.
    """
    elements = {}
    for i, term in enumerate(rule.terms):
        if term.each:
            column = column_name(term.column)
            fewest, most = database.execute(
                f"SELECT min(len({column})), max(len({column})) FROM read_parquet(?) WHERE status = 'ok'",
                [[str(path) for path in files]],
            ).fetchone()
            if fewest != most:
                raise OutputError(
                    f"The windows have {fewest} to {most} numbers in {term.column}, which are compared one by one and "
                    "must be as many in all. In a short window more layers see far: score with --layers that do so in "
                    "every window, or select with --layer-aggregation mean."
                )
            elements[i] = [f"c{i}_{j}" for j in range(most or 0)]
    return elements


def load(
    database: Any,
    files: Sequence[Path],
    rule: ScoreRule,
    elements: Mapping[int, Sequence[str]],
    *,
    places: bool,
    hashes: bool,
    windows: Sequence[Path] | None,
) -> None:
    """Table `scored`, with the measures as c0, c1, …, a list's elements as c0_0, c0_1, …

    Args:
        places: take what tells which windows overlap.
        hashes: take what tells which windows hold the same ids.
        windows: files to take the windows' starts from, where the score files do not have them; as many, of as many
            rows.
    """
    values = {}
    for i, term in enumerate(rule.terms):
        if term.each:
            values[f"c{i}"] = f"list_avg({column_name(term.column)})"
            values |= {part: f"{column_name(term.column)}[{j + 1}]" for j, part in enumerate(elements[i])}
        else:
            values[f"c{i}"] = column_name(term.column)
    usable = " AND ".join(["status = 'ok'", *(f"isfinite({value}::DOUBLE)" for value in values.values())])
    columns = [
        "window_id",
        '"group"::names AS "group"',
        "n_tokens",
        *(f"{value}::DOUBLE AS {column}" for column, value in values.items()),
        f"coalesce({usable}, false) AS ok",
        *(["hash(doc_id) AS document", "start"] if places else []),
        *(["ids_hash", "false AS copy"] if hashes else []),
    ]
    paths = [str(path) for path in files]
    source, parameters = "read_parquet(?)", [paths]
    if windows is not None:
        given = [*COLUMNS, *(term.column for term in rule.terms), *(["ids_hash"] if hashes else [])]
        own = ", ".join(map(column_name, dict.fromkeys(given)))
        source = f"""(SELECT scores.*, CASE WHEN window_id = other THEN windows.start
                                       ELSE error('the windows are not those that were scored') END AS start
                      FROM (SELECT {own} FROM read_parquet(?)) AS scores
                      POSITIONAL JOIN (SELECT window_id AS other, start FROM read_parquet(?)) AS windows)"""
        parameters = [paths, [str(path) for path in windows]]
    # As numbers, so that sorting by group is quick.
    database.execute('CREATE TABLE groups AS SELECT DISTINCT "group" FROM read_parquet(?)', [paths])
    database.execute('CREATE TYPE names AS ENUM (SELECT "group" FROM groups ORDER BY "group")')
    database.execute(f"CREATE TABLE scored AS SELECT {', '.join(columns)} FROM {source}", parameters)


def leave_out_copies(database: Any) -> None:
    """Of measured windows with the same ids keep the one whose window id, or else whose place, comes first."""
    database.execute(
        """CREATE TABLE copies AS SELECT place FROM (
               SELECT rowid AS place, row_number() OVER (PARTITION BY ids_hash ORDER BY window_id, rowid) AS number
               FROM scored WHERE ok AND ids_hash IN (
                   SELECT ids_hash FROM scored WHERE ok GROUP BY ids_hash HAVING count(*) > 1))
           WHERE number > 1"""
    )
    database.execute("UPDATE scored SET ok = false, copy = true FROM copies WHERE scored.rowid = copies.place")


def summarise(database: Any, terms: int, elements: Mapping[int, Sequence[str]], *, copies: bool) -> None:
    """Table `summary`: one row a group, with the spread of the terms' columns first."""
    spreads = "".join(
        f""", favg({c}) FILTER (ok) AS mean_{c}, stddev_pop({c}) FILTER (ok) AS std_{c},
              min({c}) FILTER (ok) AS min_{c}, max({c}) FILTER (ok) AS max_{c}"""
        for c in (*(f"c{i}" for i in range(terms)), *chain.from_iterable(elements.values()))
    )
    copy = "copy" if copies else "false"
    # A sum of floats depends on the order of its terms, and so on how threads share the rows. One thread
    # reads the table in the order of place, and gives the same means on every run.
    threads = database.execute("SELECT current_setting('threads')").fetchone()[0]
    database.execute("SET threads = 1")
    database.execute(
        f"""CREATE TABLE summary AS
            SELECT "group", count(*) FILTER (ok) AS windows,
                   coalesce(sum(n_tokens) FILTER (ok), 0)::BIGINT AS tokens,
                   count(*) FILTER (NOT ok AND NOT {copy}) AS failed,
                   count(*) FILTER ({copy}) AS duplicates{spreads}
            FROM scored GROUP BY "group" ORDER BY "group" """
    )
    database.execute(f"SET threads = {threads}")


def set_behind(database: Any, score: str) -> None:
    """Table `behind`: windows that overlap a better one of their document, unless that stands behind itself.

    In the order of start only neighbours overlap, as `longsift.windows.window_starts` cuts them. Along a run of
    overlapping windows that get better and better, the last is taken and every second before it: a window stands
    behind if the run that begins with it has an odd number of steps, to either side.
    """
    order = "PARTITION BY document ORDER BY place"
    database.execute(
        f"""CREATE TABLE behind AS
            WITH steps AS (
                SELECT place, document,
                       coalesce(lag(score) OVER ({order}) >= score AND place = lag(place) OVER ({order}) + 1 AND
                                start > lag(start) OVER ({order}) AND start < lag(ending) OVER ({order}),
                                false) AS up_before,
                       coalesce(lead(score) OVER ({order}) > score AND place = lead(place) OVER ({order}) - 1 AND
                                start < lead(start) OVER ({order}) AND lead(start) OVER ({order}) < ending,
                                false) AS up_after
                FROM (SELECT scored.rowid AS place, document, start, start + n_tokens - {_SPECIAL_TOKENS} AS ending,
                             {score} AS score
                      FROM scored JOIN summary USING ("group") WHERE ok)),
            runs AS (
                SELECT place,
                       place - max(place) FILTER (NOT up_before) OVER (
                           {order} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS before,
                       min(place) FILTER (NOT up_after) OVER (
                           {order} ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) - place AS after
                FROM steps)
            SELECT place FROM runs WHERE before % 2 = 1 OR after % 2 = 1"""
    )


def rank(database: Any, score: str, *, overlap: bool) -> None:
    """Table `ranked`: every measured window with its score and rank."""
    behind = "false" if overlap else "scored.rowid IN (SELECT place FROM behind)"
    database.execute(
        f"""CREATE TABLE ranked AS
            SELECT place, "group", n_tokens, score, behind, row_number() OVER (
                       PARTITION BY "group" ORDER BY behind, score DESC, window_id, place) AS rank
            FROM (SELECT scored.rowid AS place, "group", n_tokens, window_id, {score} AS score, {behind} AS behind
                  FROM scored JOIN summary USING ("group") WHERE ok)"""
    )


def score_formula(rule: ScoreRule, elements: Mapping[int, Sequence[str]]) -> str:
    """The score in SQL, of the columns of `scored` and `summary`."""
    return " + ".join(
        f"{float(term.weight)!r}::DOUBLE * {_value(elements.get(i, [f'c{i}']), rule.normalize)}"
        for i, term in enumerate(rule.terms)
    )


def _value(columns: Sequence[str], normalize: str) -> str:
    """The mean of the normalised columns; of none, which is so when no window was measured, nothing."""
    total = " + ".join(_normalized(column, normalize) for column in columns)
    return f"(({total}) / {len(columns)})" if columns else "NULL::DOUBLE"


def _normalized(c: str, normalize: str) -> str:
    if normalize == "none":
        return c
    if normalize == "minmax":
        return f"(CASE WHEN max_{c} > min_{c} THEN ({c} - min_{c}) / (max_{c} - min_{c}) ELSE 0 END)"
    # The range decides what is constant: rounding can leave a constant column a deviation of its own.
    return f"(CASE WHEN max_{c} > min_{c} AND std_{c} > 0 THEN ({c} - mean_{c}) / std_{c} ELSE 0 END)"


def decide(database: Any, keep: float | None, budget: int | None, mix: Mapping[str, float] | None) -> tuple[Quota, ...]:
    """Table `cuts`: how many windows, k, each group keeps; returns the quotas that led to it."""
    sizes: dict[str, tuple[int, int]] = {
        group: (windows, tokens)
        for group, windows, tokens in database.execute(
            'SELECT "group", windows, tokens FROM summary ORDER BY "group"'
        ).fetchall()
    }
    if keep is not None and mix is None:
        cuts = {group: math.ceil(exact(keep) * windows) for group, (windows, _) in sizes.items()}
        _store_cuts(database, cuts)
        return ()

    available = sum(tokens for _, tokens in sizes.values())
    total = budget if budget is not None else math.floor(exact(keep or 0) * available)
    pools = _pools(sorted(sizes), mix)
    quotas = [math.floor(share * total) for _, share in pools]
    members = [(group, pool) for pool, (groups, _) in enumerate(pools) for group in groups]
    # In the order of rank/windows, every prefix holds the same top share of each group of the pool.
    rows = database.execute(
        """WITH pools AS (
               SELECT unnest(?::VARCHAR[])::names AS "group", unnest(?::INTEGER[]) AS pool,
                      unnest(?::BIGINT[]) AS quota)
           SELECT "group", count(*) FROM (
               SELECT "group", quota, sum(n_tokens) OVER (
                   PARTITION BY pool ORDER BY rank / windows, "group" ROWS UNBOUNDED PRECEDING) AS running
               FROM ranked JOIN summary USING ("group") JOIN pools USING ("group"))
           WHERE running <= quota GROUP BY "group" """,
        [
            [group for group, _ in members],
            [pool for _, pool in members],
            [quotas[pool] for _, pool in members],
        ],
    ).fetchall()
    cuts = dict.fromkeys(sizes, 0) | dict(rows)
    _store_cuts(database, cuts)
    kept = dict(
        database.execute(
            """SELECT "group", sum(n_tokens)::BIGINT FROM ranked JOIN cuts USING ("group")
               WHERE rank <= k GROUP BY ALL"""
        ).fetchall()
    )
    result = []
    for (groups, share), quota in zip(pools, quotas, strict=True):
        taken = sum(kept.get(group, 0) for group in groups)
        exhausted = all(cuts[group] == sizes[group][0] for group in groups)
        result.append(Quota(groups, float(share), quota, taken, quota - taken if exhausted else 0))
    return tuple(result)


def _pools(groups: Sequence[str], mix: Mapping[str, float] | None) -> list[tuple[tuple[str, ...], Fraction]]:
    if mix is None:
        return [(tuple(groups), Fraction(1))]
    check_groups(mix, groups)
    pools: list[tuple[tuple[str, ...], Fraction]] = [((group,), exact(share)) for group, share in mix.items()]
    rest = 1 - sum(map(exact, mix.values()), Fraction(0))
    if rest > MIX_TOLERANCE:
        pools.append((tuple(group for group in groups if group not in mix), rest))
    return pools


def check_groups(mix: Mapping[str, float], groups: Sequence[str]) -> None:
    """Refuse a mix of groups of which there are no windows.

    Raises:
        UsageError: it names such groups.
    """
    if unknown := sorted(set(mix) - set(groups)):
        raise UsageError(
            f"--mix names groups of which there is no window: {', '.join(unknown)}. "
            f"There are: {', '.join(groups[:20])}{', …' if len(groups) > 20 else ''}."
        )


def _store_cuts(database: Any, cuts: Mapping[str, int]) -> None:
    database.execute(
        'CREATE TABLE cuts AS SELECT unnest(?::VARCHAR[])::names AS "group", unnest(?::BIGINT[]) AS k',
        [list(cuts), list(cuts.values())],
    )


def exact(value: float) -> Fraction:
    """The decimal number that was written: 0.1 of 30 windows is 3, not the 3.0000000000000004 of floats."""
    return Fraction(str(value))


def column_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def quoted(value: str) -> str:
    """A string as SQL."""
    return "'" + value.replace("'", "''") + "'"
