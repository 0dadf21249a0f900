"""The windows of a run as a table that is searched, sorted and read by pages.

At the start every window is ranked once and goes into a small DuckDB file: ids, group, score and rank, and its position
in each order. A page is then a filter and a sort of integers, in SQL whose values are parameters; texts are read from
the windows table for the rows of a page alone.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import duckdb

from longsift import pipeline
from longsift.errors import OutputError, UsageError
from longsift.ranking import quoted
from longsift.shards import RunFolder
from longsift.texts import excerpts

ROWS = 50  # of a page
LONGEST_SEARCH = 200  # characters
MOST_PAGES = 1_000_000_000
_HEAD = 160  # characters of a text
_HELD = 20_000  # heads of texts that are kept, so that going back is quick
_MEMORY = "2GB"
_COLUMNS = 'shard, "row", window_id, "group", n_tokens, score, rank, kept'  # of a Row
# Column of the position in each order, and whether windows without a score stand last in its reverse too.
SORTS = {"rank": ("by_rank", True), "score": ("by_score", True), "tokens": ("by_tokens", False), "id": ("by_id", False)}


@dataclass(frozen=True)
class Query:
    """What is asked of the table.

    Attributes:
        search: text that the window id, which begins with the document's, must hold; case does not matter.
        group: one group, or None for all.
        kept: selected windows alone.
        sort: one of `SORTS`: rank within the group, score, tokens (both largest first) or id.
        reverse: the other way round.
        page: from 1.
    """

    search: str = ""
    group: str | None = None
    kept: bool = False
    sort: str = "rank"
    reverse: bool = False
    page: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """From the parameters of an address; unknown ones are left alone.

        Raises:
            UsageError: a value that cannot work.
        """
        sort, page = given.get("sort", "rank"), given.get("page", "1")
        if sort not in SORTS:
            raise UsageError(f"The table is sorted by {', '.join(SORTS)}.")
        if not (page.isascii() and page.isdecimal() and 1 <= int(page[:12]) <= MOST_PAGES):
            raise UsageError("A page is a number from 1.")
        if len(given.get("q", "")) > LONGEST_SEARCH:
            raise UsageError(f"A search is at most {LONGEST_SEARCH} characters long.")
        return cls(
            search=given.get("q", "").strip(),
            group=given.get("group") or None,
            kept=given.get("kept") == "1",
            sort=sort,
            reverse=given.get("reverse") == "1",
            page=int(page),
        )

    def address(self, **changes: Any) -> str:
        """The parameters of an address that asks for this with changes; page 1, where no page is given."""
        query = replace(self, **({"page": 1} | changes))
        values = {
            "q": query.search,
            "group": query.group,
            "kept": "1" if query.kept else None,
            "sort": query.sort if query.sort != "rank" else None,
            "reverse": "1" if query.reverse else None,
            "page": query.page if query.page > 1 else None,
        }
        return urlencode({key: value for key, value in values.items() if value})


@dataclass(frozen=True)
class Row:
    """A window; `shard` and `row` say where it stands in the windows table. Score and rank are None if it failed."""

    shard: str
    row: int
    window_id: str
    group: str
    n_tokens: int
    score: float | None
    rank: int | None
    kept: bool


@dataclass(frozen=True)
class Page:
    """Rows of the table.

    Attributes:
        number, pages: from 1.
        first: number of the first row, from 1; 0 when there is none.
        total: windows that the query finds.
        heads: beginnings of the rows' texts, None for windows of token ids; empty where the windows cannot be read.
    """

    rows: tuple[Row, ...]
    number: int
    pages: int
    first: int
    total: int
    heads: Mapping[tuple[str, int], str | None]


class WindowTable:
    """The table of one run; a context manager, or closed by `close`. May be asked from several threads.

    Attributes:
        groups: names, sorted.
        windows, kept: how many there are; `kept` is None for a run without a selection.

    Raises:
        OutputError: a folder without finished scores, or scores that cannot be read.
    """

    def __init__(self, out: Path | str) -> None:
        folder = RunFolder(out)
        folder.check_linked_windows()
        self._windows = folder.windows
        selected = folder.manifest().get("selected", {}).get("status") == "done"
        self._scratch = tempfile.TemporaryDirectory(prefix="longsift-view-")
        ranking = Path(self._scratch.name) / "ranking.parquet"
        try:
            with pipeline.ranking_of(folder) as choice:
                choice.write_ranking(ranking)
                self.groups = [group.group for group in choice.groups]
            self._database = duckdb.connect(
                f"{self._scratch.name}/windows.duckdb",
                config={"memory_limit": _MEMORY, "temp_directory": f"{self._scratch.name}/spill"},
            )
            place = 'shard, "row"'
            self._database.execute(
                f"""CREATE TABLE windows AS
                    SELECT shard, "row", window_id, "group", n_tokens, score, rank, lower(window_id) AS lowered,
                           kept AND {str(selected).lower()} AS kept,
                           row_number() OVER (ORDER BY rank, "group", {place})::INTEGER AS by_rank,
                           row_number() OVER (ORDER BY score DESC, "group", rank, {place})::INTEGER AS by_score,
                           row_number() OVER (ORDER BY n_tokens DESC, window_id, {place})::INTEGER AS by_tokens,
                           row_number() OVER (ORDER BY window_id, {place})::INTEGER AS by_id
                    FROM read_parquet({quoted(str(ranking))}) ORDER BY by_rank"""
            )
            ranking.unlink()
            self.windows, kept = self._ask("SELECT count(*), count(*) FILTER (kept) FROM windows", {})[0]
        except BaseException:
            self._scratch.cleanup()
            raise
        self.kept = kept if selected else None
        self._heads: dict[tuple[str, int], str | None] = {}
        self._lock = threading.Lock()

    def page(self, query: Query) -> Page:
        """The rows that a query asks for; beyond the last page, the last."""
        conditions: dict[str, tuple[str, Any]] = {}
        if query.search:
            conditions["search"] = ("contains(lowered, lower($search))", query.search)
        if query.group is not None:
            conditions["group"] = ('"group" = $group', query.group)
        where = " AND ".join([*(sql for sql, _ in conditions.values()), *(["kept"] if query.kept else [])]) or "true"
        values = {name: value for name, (_, value) in conditions.items()}
        ((total,),) = self._ask(f"SELECT count(*) FROM windows WHERE {where}", values)
        pages = max(1, -(-total // ROWS))
        number = min(query.page, pages)
        column, failed_last = SORTS[query.sort]
        order = f"{'rank IS NULL, ' if failed_last else ''}{column}{' DESC' if query.reverse else ''}"
        rows = tuple(
            Row(*row)
            for row in self._ask(
                # The rows' numbers are sorted, and the rest of the rows is then looked up for a page of them alone.
                f"""SELECT {_COLUMNS} FROM windows JOIN (
                        SELECT rowid AS number FROM windows WHERE {where} ORDER BY {order}
                        LIMIT {ROWS} OFFSET $skipped) ON windows.rowid = number
                    ORDER BY {order}""",
                values | {"skipped": (number - 1) * ROWS},
            )
        )
        first = (number - 1) * ROWS + 1 if rows else 0
        return Page(rows, number, pages, first, total, self._heads_of(rows))

    def find(self, shard: str, row: int) -> Row | None:
        """The window that stands there, if any."""
        found = self._ask(
            f'SELECT {_COLUMNS} FROM windows WHERE shard = $shard AND "row" = $row',
            {"shard": shard, "row": row},
        )
        return Row(*found[0]) if found else None

    def close(self) -> None:
        """Remove the table from disk."""
        self._database.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, sql: str, values: Mapping[str, Any]) -> list[Any]:
        with self._database.cursor() as cursor:  # of this thread
            rows: list[Any] = cursor.execute(sql, dict(values)).fetchall()
            return rows

    def _heads_of(self, rows: tuple[Row, ...]) -> dict[tuple[str, int], str | None]:
        with self._lock:
            missing = {(row.shard, row.row): row.window_id for row in rows if (row.shard, row.row) not in self._heads}
            try:
                found = excerpts(self._windows, missing, _HEAD)
            except OutputError:
                return {}  # the page says so
            heads = {place: None if excerpt is None else excerpt.head for place, excerpt in found.items()}
            heads |= {place: self._heads[place] for row in rows if (place := (row.shard, row.row)) in self._heads}
            if len(self._heads) > _HELD:
                self._heads.clear()
            self._heads |= heads
            return heads
