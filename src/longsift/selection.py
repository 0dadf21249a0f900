"""Turn the measured columns into one score, rank the windows within their groups, and keep the best.

DuckDB reads the scores table, ranks it, and answers what the data set and the report ask. Whatever rule
decides, a group keeps its windows of rank 1 … k: a choice is one number k for every group.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from longsift.errors import OutputError, UsageError
from longsift.rules import ScoreRule as ScoreRule
from longsift.rules import Term as Term
from longsift.tables import SCORE_KEYS, parquet_files

_MEMORY = "2GB"  # DuckDB's own limit; above it, sorts spill to disk
_CHOSEN = pa.schema({"row": pa.int64(), "window_id": pa.string(), "score": pa.float64(), "rank": pa.int64()})
_MIX_TOLERANCE = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class Spread:
    """Mean, population standard deviation and range of one column over the measured windows of a group."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class GroupChoice:
    """What was measured and kept in one group.

    Attributes:
        windows, tokens: measured windows and their tokens.
        failed: windows without a usable measure; they are never kept.
        kept, kept_tokens: kept windows and their tokens.
        best, worst: highest and lowest score; None when no window was measured.
        cut: score of the last kept window; None when none is kept.
        columns: spread of every column of the rule, of a list's mean for a list; empty when no window was measured.
    """

    group: str
    windows: int
    tokens: int
    failed: int
    kept: int
    kept_tokens: int
    best: float | None
    cut: float | None
    worst: float | None
    columns: Mapping[str, Spread]


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


@dataclass(frozen=True)
class Histogram:
    """Counts of a group's scores in equal bins between `low` and `high`; `kept` counts the kept ones."""

    low: float
    high: float
    counts: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class RankedWindow:
    """One window of the ranking; `shard` and `row` say where it stands in the windows table."""

    shard: str
    row: int
    window_id: str
    n_tokens: int
    rank: int
    score: float
    kept: bool
    columns: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of `choose`: what every group keeps, and access to the ranking. Close it, or use `with`.

    Attributes:
        rule, keep, budget, mix: what was asked.
        shards: names of the score files, sorted; a window is identified by its shard and its row there.
        groups: one entry a group, sorted by name.
        quotas: what a budget or a mix asked for and got; empty for a plain share.
    """

    rule: ScoreRule
    keep: float | None
    budget: int | None
    mix: Mapping[str, float] | None
    shards: tuple[str, ...]
    groups: tuple[GroupChoice, ...]
    quotas: tuple[Quota, ...]
    _database: Any = field(repr=False)
    _folder: Path = field(repr=False)

    @property
    def windows(self) -> int:
        """Measured windows."""
        return sum(group.windows for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens of the measured windows."""
        return sum(group.tokens for group in self.groups)

    @property
    def failed(self) -> int:
        """Windows without a usable measure."""
        return sum(group.failed for group in self.groups)

    @property
    def kept(self) -> int:
        """Kept windows."""
        return sum(group.kept for group in self.groups)

    @property
    def kept_tokens(self) -> int:
        """Tokens of the kept windows."""
        return sum(group.kept_tokens for group in self.groups)

    def chosen(self) -> Iterator[tuple[str, pa.Table]]:
        """The kept windows, one shard at a time.

        Yields:
            A shard's name and its kept windows in row order: `row` int64 (0-based), `window_id` string,
            `score` float64, `rank` int64. Shards without a kept window are left out.
        """
        path = self._folder / "chosen.parquet"
        if not path.exists():
            # A file, because DuckDB's Arrow readers changed their names between its versions.
            self._database.execute(
                f"""COPY (SELECT shard, row, window_id, score, rank FROM ranked JOIN cuts USING ("group")
                    WHERE rank <= k ORDER BY shard, row) TO {_text(str(path))} (FORMAT parquet)"""
            )
        for shard, table in _by_shard(pq.ParquetFile(path).iter_batches(batch_size=1 << 16)):
            yield self.shards[shard], table

    def histograms(self, bins: int = 60) -> dict[str, Histogram]:
        """Histograms of the scores, by group, over one range common to all groups."""
        lows = [group.worst for group in self.groups if group.worst is not None]
        highs = [group.best for group in self.groups if group.best is not None]
        if not lows:
            return {}
        low, high = min(lows), max(highs)
        if low == high:
            low, high = low - 0.5, high + 0.5
        rows = self._database.execute(
            """SELECT "group", least(floor((score - ?) / ? * ?), ?)::INTEGER AS bin, count(*),
                      count(*) FILTER (rank <= k)
               FROM ranked JOIN cuts USING ("group") GROUP BY ALL""",
            [low, high - low, bins, bins - 1],
        ).fetchall()
        counts: dict[str, list[int]] = {group.group: [0] * bins for group in self.groups if group.windows}
        kept: dict[str, list[int]] = {group: [0] * bins for group in counts}
        for group, index, count, kept_count in rows:
            counts[group][index], kept[group][index] = count, kept_count
        return {group: Histogram(low, high, tuple(counts[group]), tuple(kept[group])) for group in counts}

    def ranked(self, group: str, first: int, last: int) -> list[RankedWindow]:
        """The windows of `group` with ranks `first` to `last`, both included, best first."""
        names = [term.column for term in self.rule.terms]
        rows = self._database.execute(
            f"""SELECT shard, row, window_id, n_tokens, rank, score, rank <= k{_columns(names)}
                FROM ranked JOIN cuts USING ("group")
                WHERE "group" = ? AND rank BETWEEN ? AND ? ORDER BY rank""",
            [group, first, last],
        ).fetchall()
        return [
            RankedWindow(
                shard=self.shards[shard],
                row=row,
                window_id=window_id,
                n_tokens=n_tokens,
                rank=rank,
                score=score,
                kept=kept,
                columns=dict(zip(names, columns, strict=True)),
            )
            for shard, row, window_id, n_tokens, rank, score, kept, *columns in rows
        ]

    def close(self) -> None:
        """Remove the ranking from disk."""
        self._database.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Choice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def choose(
    scores: Path,
    rule: ScoreRule,
    *,
    keep: float | None = None,
    budget: int | None = None,
    mix: Mapping[str, float] | None = None,
    threads: int | None = None,
) -> Choice:
    """Rank the windows of a scores table within their groups and decide which to keep.

    Rank 1 is the best score of its group; equal scores are ordered by window id, then by place in the table.
    Rows whose status is not "ok", or with a null or non-finite column, are counted as failed and never kept.
    The result depends on the table alone: not on the number of threads, nor on the run.
    The ranking lies in a folder of its own under TMPDIR until the choice is closed, about 60 bytes a window.

    Args:
        scores: folder of the score files (`longsift.tables.SCORE_KEYS` and the rule's columns).
        rule: how the columns become a score.
        keep: share of windows to keep, in (0, 1]: each group keeps its ceil(keep · windows) best.
        budget: tokens to keep: the same top share of every group, as much as fits.
        mix: share of the kept tokens by group, of `budget` or of `keep` · all measured tokens. Groups that it
            does not name share what is left, the same top share of each; nothing when the shares sum to 1.
        threads: of DuckDB; all cores by default.

    Raises:
        UsageError: not exactly one of keep and budget; a value out of range; a mix that sums to more than 1,
            or names a group that the table does not have.
        OutputError: the folder has no score files, or they lack a column of the rule, or hold lists of several
            lengths where it takes each element by itself.
    """
    check_request(keep, budget, mix)
    files = parquet_files(scores)
    names = [term.column for term in rule.terms]
    _check_table(scores, files, names)
    folder = Path(tempfile.mkdtemp(prefix="longsift-selection-"))
    database = duckdb.connect(
        str(folder / "ranking.duckdb"),
        config={
            "memory_limit": _MEMORY,
            "temp_directory": str(folder / "spill"),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
        | ({} if threads is None else {"threads": str(threads)}),
    )
    try:
        elements = _elements(database, files, rule)
        _load(database, files, rule, elements)
        _summarise(database, len(names), elements)
        _rank(database, rule, elements)
        quotas = _decide(database, keep, budget, mix)
        return Choice(
            rule=rule,
            keep=keep,
            budget=budget,
            mix=None if mix is None else dict(mix),
            shards=tuple(path.stem for path in files),
            groups=_groups(database, names),
            quotas=quotas,
            _database=database,
            _folder=folder,
        )
    except BaseException as error:
        database.close()
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, duckdb.Error):
            raise OutputError(
                f"The scores in {scores} could not be read ({error}). Score again with --overwrite."
            ) from error
        raise


def select_table(
    scores: pa.Table, rule: ScoreRule, *, keep: float | None = None, budget: int | None = None
) -> pa.Table:
    """As `choose`, for a scores table in memory: its kept rows with `score` and `rank`, by group, best first."""
    with tempfile.TemporaryDirectory(prefix="longsift-scores-") as folder:
        pq.write_table(scores, Path(folder) / "scores.parquet")
        with choose(Path(folder), rule, keep=keep, budget=budget) as choice:
            chosen = pa.concat_tables([_CHOSEN.empty_table(), *(table for _, table in choice.chosen())])
    kept = scores.take(chosen["row"])
    for name in ("score", "rank"):
        kept = kept.append_column(name, chosen[name])
    return kept.sort_by([("group", "ascending"), ("rank", "ascending")])


def check_request(keep: float | None, budget: int | None, mix: Mapping[str, float] | None) -> None:
    """Check what `choose` is asked for, as far as that can be done without a table.

    Raises:
        UsageError: it cannot work.
    """
    if (keep is None) == (budget is None):
        raise UsageError("Give either --keep SHARE or --budget TOKENS.")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep is a share above 0 and at most 1, not {keep}.")
    if budget is not None and not 1 <= budget < 2**63:
        raise UsageError(f"--budget is a number of tokens from 1 to 2**63 - 1, not {budget}.")
    if mix is None:
        return
    if not mix:
        raise UsageError("--mix names no group. Write it as arxiv=0.3,book=0.3.")
    wrong = [f"{group}={share}" for group, share in mix.items() if not 0 <= share <= 1]
    if wrong:
        raise UsageError(f"--mix takes shares from 0 to 1, not {', '.join(wrong)}.")
    total = sum(map(_exact, mix.values()))
    if total > 1 + _MIX_TOLERANCE:
        raise UsageError(f"The shares of --mix sum to {float(total):g}; lower them to at most 1.")


def _check_table(scores: Path, files: Sequence[Path], names: Sequence[str]) -> None:
    if not files:
        raise OutputError(f"{scores} holds no scores. Run 'longsift score' first.")
    present = pq.read_schema(files[0]).names
    missing = [name for name in (*SCORE_KEYS.names, *names) if name not in present]
    if missing:
        raise OutputError(
            f"The scores in {scores} have no column {', '.join(missing)}. "
            "Name the method that they were made with, or score again with --overwrite."
        )


def _elements(database: Any, files: Sequence[Path], rule: ScoreRule) -> dict[int, list[str]]:
    """Columns for the elements of each list that is taken by element, by the term's place in the rule."""
    elements = {}
    for i, term in enumerate(rule.terms):
        if term.each:
            column = _name(term.column)
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


def _load(database: Any, files: Sequence[Path], rule: ScoreRule, elements: Mapping[int, Sequence[str]]) -> None:
    """Table `scored`: one row a window, its measures as c0, c1, …; a list's elements as c0_0, c0_1, …"""
    values = {}
    for i, term in enumerate(rule.terms):
        if term.each:
            values[f"c{i}"] = f"list_avg({_name(term.column)})"
            values |= {part: f"{_name(term.column)}[{j + 1}]" for j, part in enumerate(elements[i])}
        else:
            values[f"c{i}"] = _name(term.column)
    measures = [f"{value}::DOUBLE AS {column}" for column, value in values.items()]
    usable = " AND ".join(["status = 'ok'", *(f"isfinite({value}::DOUBLE)" for value in values.values())])
    paths = [str(path) for path in files]
    database.execute(
        f"""CREATE TABLE scored AS
            SELECT shard, file_row_number AS row, window_id, "group", n_tokens::BIGINT AS n_tokens,
                   {", ".join(measures)}, coalesce({usable}, false) AS ok
            FROM read_parquet(?, filename = true, file_row_number = true)
            JOIN (SELECT unnest(?) AS filename, unnest(range(?))::INTEGER AS shard) USING (filename)
            ORDER BY shard, row""",
        [paths, paths, len(paths)],
    )


def _summarise(database: Any, terms: int, elements: Mapping[int, Sequence[str]]) -> None:
    """Table `summary`: one row a group, with the spread of the terms' columns first."""
    spreads = "".join(
        f""", favg({c}) FILTER (ok) AS mean_{c}, stddev_pop({c}) FILTER (ok) AS std_{c},
              min({c}) FILTER (ok) AS min_{c}, max({c}) FILTER (ok) AS max_{c}"""
        for c in (*(f"c{i}" for i in range(terms)), *chain.from_iterable(elements.values()))
    )
    # A sum of floats depends on the order of its terms, and so on how threads share the rows. One thread
    # reads the table in the order of shard and row, and gives the same means on every run.
    threads = database.execute("SELECT current_setting('threads')").fetchone()[0]
    database.execute("SET threads = 1")
    database.execute(
        f"""CREATE TABLE summary AS
            SELECT "group", count(*) FILTER (ok) AS windows,
                   coalesce(sum(n_tokens) FILTER (ok), 0)::BIGINT AS tokens,
                   count(*) FILTER (NOT ok) AS failed{spreads}
            FROM scored GROUP BY "group" ORDER BY "group" """
    )
    database.execute(f"SET threads = {threads}")


def _rank(database: Any, rule: ScoreRule, elements: Mapping[int, Sequence[str]]) -> None:
    """Table `ranked`: every measured window with its score and rank."""
    score = " + ".join(
        f"{float(term.weight)!r}::DOUBLE * {_value(elements.get(i, [f'c{i}']), rule.normalize)}"
        for i, term in enumerate(rule.terms)
    )
    parts = "".join(f", {part}" for part in chain.from_iterable(elements.values()))
    database.execute(
        f"""CREATE TABLE ranked AS
            SELECT *, row_number() OVER (
                          PARTITION BY "group" ORDER BY score DESC, window_id, shard, row) AS rank
            FROM (SELECT scored.* EXCLUDE (ok{parts}), {score} AS score FROM scored JOIN summary USING ("group")
                  WHERE ok)"""
    )
    database.execute("DROP TABLE scored")


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


def _decide(
    database: Any, keep: float | None, budget: int | None, mix: Mapping[str, float] | None
) -> tuple[Quota, ...]:
    """Table `cuts`: how many windows, k, each group keeps; returns the quotas that led to it."""
    sizes: dict[str, tuple[int, int]] = {
        group: (windows, tokens)
        for group, windows, tokens in database.execute(
            'SELECT "group", windows, tokens FROM summary ORDER BY "group"'
        ).fetchall()
    }
    if keep is not None and mix is None:
        cuts = {group: math.ceil(_exact(keep) * windows) for group, (windows, _) in sizes.items()}
        _store_cuts(database, cuts)
        return ()

    available = sum(tokens for _, tokens in sizes.values())
    total = budget if budget is not None else math.floor(_exact(keep or 0) * available)
    pools = _pools(sorted(sizes), mix)
    quotas = [math.floor(share * total) for _, share in pools]
    members = [(group, pool) for pool, (groups, _) in enumerate(pools) for group in groups]
    # In the order of rank/windows, every prefix holds the same top share of each group of the pool.
    rows = database.execute(
        """WITH pools AS (
               SELECT unnest(?::VARCHAR[]) AS "group", unnest(?::INTEGER[]) AS pool,
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
    unknown = sorted(set(mix) - set(groups))
    if unknown:
        raise UsageError(
            f"--mix names groups that the scores do not have: {', '.join(unknown)}. "
            f"They have: {', '.join(groups[:20])}{', …' if len(groups) > 20 else ''}."
        )
    pools: list[tuple[tuple[str, ...], Fraction]] = [((group,), _exact(share)) for group, share in mix.items()]
    rest = 1 - sum(map(_exact, mix.values()), Fraction(0))
    if rest > _MIX_TOLERANCE:
        pools.append((tuple(group for group in groups if group not in mix), rest))
    return pools


def _store_cuts(database: Any, cuts: Mapping[str, int]) -> None:
    database.execute(
        'CREATE TABLE cuts AS SELECT unnest(?::VARCHAR[]) AS "group", unnest(?::BIGINT[]) AS k',
        [list(cuts), list(cuts.values())],
    )


def _groups(database: Any, names: Sequence[str]) -> tuple[GroupChoice, ...]:
    rows = database.execute(
        """SELECT "group", windows, tokens, failed, coalesce(kept, 0), coalesce(kept_tokens, 0),
                  best, cut, worst, summary.* EXCLUDE ("group", windows, tokens, failed)
           FROM summary LEFT JOIN (
               SELECT "group", count(*) FILTER (rank <= k) AS kept,
                      sum(n_tokens) FILTER (rank <= k)::BIGINT AS kept_tokens,
                      max(score) AS best, min(score) FILTER (rank <= k) AS cut, min(score) AS worst
               FROM ranked JOIN cuts USING ("group") GROUP BY "group") USING ("group")
           ORDER BY "group" """
    ).fetchall()
    return tuple(
        GroupChoice(
            group=row[0],
            windows=row[1],
            tokens=row[2],
            failed=row[3],
            kept=row[4],
            kept_tokens=row[5],
            best=row[6],
            cut=row[7],
            worst=row[8],
            columns={name: Spread(*row[9 + 4 * i : 13 + 4 * i]) for i, name in enumerate(names) if row[1]},
        )
        for row in rows
    )


def _by_shard(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Cut a stream that is sorted by `shard` into one table a shard."""
    current: int | None = None
    pieces: list[pa.RecordBatch] = []
    for batch in batches:
        shards = batch.column("shard").to_numpy()
        start = 0
        while start < len(shards):
            shard = int(shards[start])
            end = int(shards.searchsorted(shard, side="right"))
            if current is not None and shard != current:
                yield current, pa.Table.from_batches(pieces).select(_CHOSEN.names).cast(_CHOSEN)
                pieces = []
            current = shard
            pieces.append(batch.slice(start, end - start))
            start = end
    if current is not None:
        yield current, pa.Table.from_batches(pieces).select(_CHOSEN.names).cast(_CHOSEN)


def _exact(value: float) -> Fraction:
    """The decimal number that was written: 0.1 of 30 windows is 3, not the 3.0000000000000004 of floats."""
    return Fraction(str(value))


def _columns(names: Sequence[str]) -> str:
    return "".join(f", c{i}" for i in range(len(names)))


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
