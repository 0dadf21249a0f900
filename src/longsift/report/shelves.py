"""The windows that a report shows, and the beginnings and ends of their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
from markupsafe import escape

from longsift.errors import OutputError
from longsift.report.words import plain
from longsift.selection import Choice, GroupChoice, RankedWindow

_EXAMPLES = 3  # best and worst windows
# Characters of the beginning and of the end that are shown of each: the first that all texts together have room for.
_LENGTHS = ((1300, 700), (800, 400), (400, 200), (200, 100), (80, 40))
_ROOM = 1_000_000  # bytes of the page

Place = tuple[str, int]  # shard and row
Shelf = tuple[str, list[RankedWindow]]


@dataclass(frozen=True)
class Text:
    """The beginning and end of a window's text, and how many characters between them are left out."""

    head: str
    tail: str
    left_out: int


def shelves(choice: Choice, group: GroupChoice) -> list[Shelf]:
    """Windows worth reading: the best, those on both sides of the cut, and the worst; none twice.

    Those that stand behind for an overlap are left out: their ranks do not go with their scores.
    """
    n, k = group.windows - group.behind, group.kept
    found = []
    after = 0
    for title, first, last in (
        ("Best", 1, _EXAMPLES),
        ("Around the cut", k - 1, k + 2),
        ("Worst", n - _EXAMPLES + 1, n),
    ):
        first, last = max(first, after + 1), min(last, n)
        if first <= last and not (title == "Around the cut" and k in (0, n)):
            found.append((title, choice.ranked(group.group, first, last)))
            after = last
    return found


def texts(windows: Path, shown: Sequence[RankedWindow]) -> dict[Place, Text | None]:
    """Texts by shard and row, as long as there is room for on a page; None for windows given as token ids.

    Raises:
        OutputError: the windows are not those that were scored, or cannot be read.
    """
    read = _read(windows, shown)
    for head, tail in _LENGTHS:
        found = {place: None if text is None else _excerpt(*text, head, tail) for place, text in read.items()}
        if sum(_size(text) for text in found.values()) <= _ROOM:
            break
    return found


def _read(windows: Path, shown: Sequence[RankedWindow]) -> dict[Place, tuple[int, str, str] | None]:
    """Length, beginning and end of the texts."""
    head, tail = _LENGTHS[0]
    rows: dict[str, dict[int, str]] = {}
    for window in shown:
        rows.setdefault(window.shard, {})[window.row] = window.window_id
    texts: dict[Place, tuple[int, str, str] | None] = {}
    with duckdb.connect() as database:
        for shard, wanted in rows.items():
            path = windows / f"{shard}.parquet"
            try:
                found = database.execute(
                    """SELECT file_row_number, window_id, length(text), left(text, ?), right(text, ?)
                       FROM read_parquet(?, file_row_number = true) WHERE list_contains(?, file_row_number)""",
                    [head + tail, tail, str(path), list(wanted)],
                ).fetchall()
            except duckdb.Error as error:
                raise OutputError(
                    f"{path} cannot be read ({error}); its scores were. Cut the windows again with --overwrite."
                ) from error
            if {row: window_id for row, window_id, *_ in found} != wanted:
                raise OutputError(
                    f"{path} does not hold the windows that were scored. Score them again with --overwrite."
                )
            for row, _, length, beginning, end in found:
                texts[shard, row] = None if beginning is None else (length, beginning, end)
    return texts


def _excerpt(length: int, beginning: str, end: str, head: int, tail: int) -> Text:
    if length <= head + tail:
        return Text(beginning, "", 0)
    return Text(beginning[:head], end[-tail:], length - head - tail)


def _size(text: Text | None) -> int:
    return 0 if text is None else len(str(escape(plain(text.head + text.tail))).encode())


def all_windows(found: Mapping[str, Sequence[Shelf]]) -> list[RankedWindow]:
    """All windows of all groups' shelves."""
    return [window for some in found.values() for _, listed in some for window in listed]
