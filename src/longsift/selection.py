"""Turn the measured columns into one score, rank the windows within their groups, and keep the best.

DuckDB reads the scores table, ranks it (`longsift.ranking`), and answers what the data set and the report ask.
Whatever rule decides, a group keeps its windows of rank 1 … k: a choice is one number k for every group.
"""

from __future__ import annotations

import bisect
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longsift import distributions, ranking
from longsift.distributions import Cell, Failure, Histogram, Sketch
from longsift.errors import OutputError, UsageError
from longsift.ranking import Quota as Quota
from longsift.rules import ScoreRule as ScoreRule
from longsift.rules import Term as Term
from longsift.tables import parquet_files

_MEMORY = "2GB"  # DuckDB's own limit; above it, tables and sorts spill to disk
_THREADS = 8  # at most, since each needs memory of its own
_FOLDER = ".selection-"  # of a ranking; its file `lock` is locked while that is in use
_CHOSEN = pa.schema({"row": pa.int64(), "window_id": pa.string(), "score": pa.float64(), "rank": pa.int64()})


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
        windows, tokens: measured windows and their tokens, duplicates left out.
        failed: windows without a usable measure; they are never kept.
        duplicates: measured windows whose ids another window has that is taken in their place; they are never kept.
        behind: windows that overlap a better one of their document, and so rank behind all others.
        passed_over: those of them that score at least `cut` and are not kept.
        kept, kept_tokens: kept windows and their tokens.
        best, worst: highest and lowest score; None when no window was measured.
        cut: lowest score of a kept window; None when none is kept.
        columns: spread of every column of the rule, of a list's mean for a list; empty when no window was measured.
    """

    group: str
    windows: int
    tokens: int
    failed: int
    duplicates: int
    behind: int
    passed_over: int
    kept: int
    kept_tokens: int
    best: float | None
    cut: float | None
    worst: float | None
    columns: Mapping[str, Spread]

    @property
    def overlapping(self) -> int:
        """Kept windows that overlap a better one: the group has no others left."""
        return max(0, self.kept - (self.windows - self.behind))


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
        scores: folder of the score files.
        shards: their names, sorted; a window is identified by its shard and its row there.
        groups: one entry a group, sorted by name.
        quotas: what a budget or a mix asked for and got; empty for a plain share.
    """

    rule: ScoreRule
    keep: float | None
    budget: int | None
    mix: Mapping[str, float] | None
    scores: Path
    shards: tuple[str, ...]
    groups: tuple[GroupChoice, ...]
    quotas: tuple[Quota, ...]
    _ends: tuple[int, ...] = field(repr=False)  # place after the last row of each shard
    _placed: bool = field(repr=False)  # all score files say where a window starts
    _database: Any = field(repr=False)
    _folder: Path = field(repr=False)
    _lock: IO[str] = field(repr=False)

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
    def duplicates(self) -> int:
        """Windows in whose place another one with the same ids is taken."""
        return sum(group.duplicates for group in self.groups)

    @property
    def passed_over(self) -> int:
        """Windows that score high enough, but overlap a better one of their document."""
        return sum(group.passed_over for group in self.groups)

    @property
    def overlapping(self) -> int:
        """Kept windows that overlap a better one."""
        return sum(group.overlapping for group in self.groups)

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
            with _room(self._folder):
                self._database.execute(
                    f"""COPY (SELECT place, scored.window_id, score, rank
                              FROM ranked JOIN cuts USING ("group") JOIN scored ON scored.rowid = place
                              WHERE rank <= k ORDER BY place)
                        TO {ranking.quoted(str(path))} (FORMAT parquet)"""
                )
        with pq.ParquetFile(path) as file:
            for shard, table in _by_shard(file.iter_batches(batch_size=1 << 16), self._ends):
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
        groups = [group.group for group in self.groups if group.windows]
        return distributions.histograms(self._database, groups, low, high, bins)

    def sketches(self, apart: Sequence[str], steps: int = 1000) -> dict[str | None, Sketch]:
        """What a plain share of 1/steps, 2/steps, … would keep: of the groups `apart`, and of all others under None."""
        return distributions.sketches(self._database, apart, steps)

    def measures(self, x: int, y: int, bins: int) -> list[Cell]:
        """Windows by two columns of the rule, its terms number `x` and `y`; of a list its mean is taken."""
        return distributions.cells(self._database, f"c{x}", f"c{y}", bins)

    def lengths(self, bins: int) -> list[Cell] | None:
        """Windows by the tokens of their document up to its last window, in bins of a logarithm, and their score.

        None where the score files do not say where a window starts.
        """
        return distributions.cells(self._database, "length", "score", bins, log_x=True) if self._extents() else None

    def depths(self, bins: int) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
        """Windows and kept windows by the place of their middle in the document, and how many are all of theirs.

        None where the score files do not say where a window starts.
        """
        return distributions.depths(self._database, bins) if self._extents() else None

    def failures(self, reasons: Sequence[str], most: int) -> dict[str, list[Failure]]:
        """The first windows that were not scored for each of `reasons`, at most `most` of each."""
        return distributions.failures(self._database, self._files, reasons, most)

    @property
    def _files(self) -> list[Path]:
        return [self.scores / f"{shard}.parquet" for shard in self.shards]

    def _extents(self) -> bool:
        if not self._placed:
            return False
        distributions.load_extents(self._database, self._files)
        return True

    def ranked(self, group: str, first: int, last: int) -> list[RankedWindow]:
        """The windows of `group` with ranks `first` to `last`, both included, best first."""
        names = [term.column for term in self.rule.terms]
        rows = self._database.execute(
            f"""SELECT place, scored.window_id, ranked.n_tokens, rank, score, rank <= k{_columns(names)}
                FROM ranked JOIN cuts USING ("group") JOIN scored ON scored.rowid = place
                WHERE ranked."group" = ? AND rank BETWEEN ? AND ? ORDER BY rank""",
            [group, first, last],
        ).fetchall()
        return [
            RankedWindow(
                shard=self.shards[shard],
                row=place - (self._ends[shard - 1] if shard else 0),
                window_id=window_id,
                n_tokens=n_tokens,
                rank=rank,
                score=score,
                kept=kept,
                columns=dict(zip(names, columns, strict=True)),
            )
            for place, window_id, n_tokens, rank, score, kept, *columns in rows
            for shard in [bisect.bisect_right(self._ends, place)]
        ]

    def write_ranking(self, path: Path) -> None:
        """Write every window of the scores table as a row of a Parquet file, in no order.

        Columns: `shard` string and `row` int64, its place in the windows table; `window_id` and `group` string;
        `n_tokens` int32; `score` float64 and `rank` int64, null where it was not measured or is a duplicate; `kept`.
        """
        firsts = [0, *self._ends[:-1]]
        filled = [i for i, (first, end) in enumerate(zip(firsts, self._ends, strict=True)) if first < end]
        self._database.execute(
            "CREATE OR REPLACE TEMP TABLE shards AS SELECT unnest(?::VARCHAR[]) AS shard, unnest(?::BIGINT[]) AS first",
            [[self.shards[i] for i in filled], [firsts[i] for i in filled]],
        )
        self._database.execute(
            f"""COPY (SELECT shard, place - first AS "row", window_id, "group"::VARCHAR AS "group", n_tokens,
                             score, rank, coalesce(rank <= k, false) AS kept
                      FROM (SELECT scored.rowid AS place, scored.window_id, scored."group", scored.n_tokens, score, rank
                            FROM scored LEFT JOIN ranked ON scored.rowid = place) AS windows
                      ASOF JOIN shards ON windows.place >= shards.first
                      LEFT JOIN cuts USING ("group"))
                TO {ranking.quoted(str(path))} (FORMAT parquet)"""
        )

    def close(self) -> None:
        """Remove the ranking from disk."""
        self._database.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

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
    overlap: bool = True,
    dedup: Literal["exact"] | None = None,
    windows: Path | None = None,
    threads: int | None = None,
) -> Choice:
    """Rank the windows of a scores table within their groups and decide which to keep.

    Rank 1 is the best score of its group; equal scores are ordered by window id, then by place in the table.
    Rows whose status is not "ok", or with a null or non-finite column, are counted as failed and never kept.
    The result depends on the table alone: not on the number of threads, nor on the run.
    The ranking lies in memory and, above 2 GB, in a hidden folder beside `scores` until the choice is closed, 150
    to 230 bytes a window.

    Args:
        scores: folder of the score files (`longsift.tables.SCORE_KEYS` and the rule's columns).
        rule: how the columns become a score.
        keep: share of windows to keep, in (0, 1]: each group keeps its ceil(keep · windows) best.
        budget: tokens to keep: the same top share of every group, as much as fits.
        mix: share of the kept tokens by group, of `budget` or of `keep` · all measured tokens. Groups that it
            does not name share what is left, the same top share of each; nothing when the shares sum to 1.
        overlap: rank windows by their score alone. Otherwise a window that overlaps a better one of its document, which
            does not stand behind itself, stands behind all windows of its group that do not: it is kept where a
            group has too few others only. Of two with equal scores the first in the document is the better.
        dedup: "exact" takes one of all measured windows with the same token ids, whatever their groups: that whose
            window id comes first. The others are counted apart, and nothing else depends on them.
        windows: folder of the windows table, to see overlaps where the score files have no column `start`, as
            those of earlier versions.
        threads: of DuckDB; all cores, up to 8, by default.

    Raises:
        UsageError: not exactly one of keep and budget; a value out of range; a mix that sums to more than 1,
            or names a group that the table does not have.
        OutputError: the folder has no score files, or they lack a column of the rule, or hold lists of several
            lengths where it takes each element by itself; or there is nothing to see overlaps or duplicates by;
            or the disk has no room for the ranking.
    """
    check_request(keep, budget, mix)
    if dedup not in (None, "exact"):
        raise UsageError(f"--dedup takes exact, not '{dedup}'.")
    names = [term.column for term in rule.terms]
    files = parquet_files(scores)
    rows, columns = _footers(scores, files)
    _check_columns(scores, columns, [*ranking.COLUMNS, *names])
    if dedup and "ids_hash" not in columns:
        raise OutputError(
            f"The scores in {scores} have no column ids_hash: an earlier version made them. "
            "Select without --dedup, or score again with --overwrite."
        )
    starts = None if overlap or "start" in columns else _windows_files(scores, files, windows)
    folder, lock = _make_folder(scores.parent)
    database = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": _MEMORY,
            "threads": str(threads or min(os.cpu_count() or 1, _THREADS)),
            "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": "true",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        },
    )
    try:
        with _room(folder):
            elements = ranking.find_elements(database, files, rule)
            ranking.load(database, files, rule, elements, places=not overlap, hashes=dedup is not None, windows=starts)
            if dedup:
                ranking.leave_out_copies(database)
            ranking.summarise(database, len(names), elements, copies=dedup is not None)
            score = ranking.score_formula(rule, elements)
            if not overlap:
                ranking.set_behind(database, score)
            ranking.rank(database, score, overlap=overlap)
            quotas = ranking.decide(database, keep, budget, mix)
        return Choice(
            rule=rule,
            keep=keep,
            budget=budget,
            mix=None if mix is None else dict(mix),
            scores=scores,
            shards=tuple(path.stem for path in files),
            groups=_groups(database, names),
            quotas=quotas,
            _ends=tuple(accumulate(rows)),
            _placed="start" in columns,
            _database=database,
            _folder=folder,
            _lock=lock,
        )
    except BaseException as error:
        database.close()
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
        if isinstance(error, duckdb.Error):
            raise OutputError(
                f"The scores in {scores} could not be read ({error}). Score again with --overwrite."
            ) from error
        raise


def select_table(
    scores: pa.Table,
    rule: ScoreRule,
    *,
    keep: float | None = None,
    budget: int | None = None,
    overlap: bool = True,
    dedup: Literal["exact"] | None = None,
) -> pa.Table:
    """As `choose`, for a scores table in memory: its kept rows with `score` and `rank`, by group, best first."""
    with tempfile.TemporaryDirectory(prefix="longsift-scores-") as folder:
        table = Path(folder) / "scores"
        table.mkdir()
        pq.write_table(scores, table / "scores.parquet")
        with choose(table, rule, keep=keep, budget=budget, overlap=overlap, dedup=dedup) as choice:
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
    total = sum(map(ranking.exact, mix.values()))
    if total > 1 + ranking.MIX_TOLERANCE:
        raise UsageError(f"The shares of --mix sum to {float(total):g}; lower them to at most 1.")


def _footers(scores: Path, files: Sequence[Path]) -> tuple[list[int], set[str]]:
    """Rows of each score file, and the columns that all of them have."""
    if not files:
        raise OutputError(f"{scores} holds no scores. Run 'longsift score' first.")
    rows, columns = [], []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                rows.append(file.metadata.num_rows)
                columns.append(set(file.schema_arrow.names))
        except (OSError, pa.ArrowException) as error:
            raise OutputError(f"{path} could not be read ({error}). Score again with --overwrite.") from error
    return rows, set.intersection(*columns)


def _check_columns(scores: Path, columns: set[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise OutputError(
            f"The scores in {scores} have no column {', '.join(missing)}. "
            "Name the method that they were made with, or score again with --overwrite."
        )


def _windows_files(scores: Path, files: Sequence[Path], windows: Path | None) -> list[Path]:
    found = [] if windows is None else [windows / path.name for path in files]
    if not found or not all(path.is_file() for path in found):
        raise OutputError(
            f"The scores in {scores} have no column start, since an earlier version made them, and "
            f"{windows or 'OUT/windows'} does not hold their windows: overlaps are not known. Select with --overlap."
        )
    return found


def _make_folder(parent: Path) -> tuple[Path, IO[str]]:
    """A new folder for a ranking and its lock; those whose process was killed are removed."""
    for leftover in parent.glob(f"{_FOLDER}*/lock"):
        with leftover.open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(leftover.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
    lock = (folder / "new").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # others see it locked
    return folder, lock


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Within the block, a ranking that finds no room in its folder is an error that says what to do."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        if isinstance(error, duckdb.IOException) and str(folder) not in str(error):
            raise  # it is of a file that is read
        raise OutputError(
            f"There is no room to rank the windows in {folder.parent}, beside {_MEMORY} of memory "
            f"({str(error).splitlines()[0]}). Free about 230 bytes a window there, and run the same command again."
        ) from error


def _groups(database: Any, names: Sequence[str]) -> tuple[GroupChoice, ...]:
    rows = database.execute(
        """WITH choices AS (
               SELECT "group", count(*) FILTER (behind) AS behind, count(*) FILTER (rank <= k) AS kept,
                      coalesce(sum(n_tokens) FILTER (rank <= k), 0)::BIGINT AS kept_tokens,
                      max(score) AS best, min(score) FILTER (rank <= k) AS cut, min(score) AS worst
               FROM ranked JOIN cuts USING ("group") GROUP BY "group"),
           passed AS (
               SELECT "group", count(*) AS passed_over
               FROM ranked JOIN cuts USING ("group") JOIN choices USING ("group")
               WHERE ranked.behind AND rank > k AND score >= cut GROUP BY "group")
           SELECT "group", windows, tokens, failed, duplicates, coalesce(behind, 0), coalesce(passed_over, 0),
                  coalesce(kept, 0), coalesce(kept_tokens, 0), best, cut, worst,
                  summary.* EXCLUDE ("group", windows, tokens, failed, duplicates)
           FROM summary LEFT JOIN choices USING ("group") LEFT JOIN passed USING ("group")
           ORDER BY "group" """
    ).fetchall()
    counts = [item.name for item in fields(GroupChoice)][:-1]
    return tuple(
        GroupChoice(
            **dict(zip(counts, row, strict=False)),
            columns={
                name: Spread(*row[len(counts) + 4 * i : len(counts) + 4 * i + 4])
                for i, name in enumerate(names)
                if row[1]
            },
        )
        for row in rows
    )


def _by_shard(batches: Iterator[pa.RecordBatch], ends: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
    """Cut a stream that is sorted by `place` into one table a shard, whose `row` counts from the shard's first."""
    current: int | None = None
    pieces: list[pa.RecordBatch] = []

    def table(shard: int) -> pa.Table:
        whole = pa.Table.from_batches(pieces)
        row = pc.subtract(whole["place"], ends[shard - 1] if shard else 0)
        return whole.set_column(0, "row", row).cast(_CHOSEN)

    for batch in batches:
        places = batch.column("place").to_numpy()
        start = 0
        while start < len(places):
            shard = bisect.bisect_right(ends, places[start])
            end = int(places.searchsorted(ends[shard]))
            if current is not None and shard != current:
                yield current, table(current)
                pieces = []
            current = shard
            pieces.append(batch.slice(start, end - start))
            start = end
    if current is not None:
        yield current, table(current)


def _columns(names: Sequence[str]) -> str:
    return "".join(f", c{i}" for i in range(len(names)))
