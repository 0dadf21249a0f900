"""The windows that a report shows, and the beginnings and ends of their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import escape

from longsift.report.words import plain
from longsift.selection import Choice, GroupChoice, RankedWindow
from longsift.texts import Excerpt, excerpts

_EXAMPLES = 3  # best and worst windows
# Characters of the beginning and of the end that are shown of each: the first that all texts together have room for.
_LENGTHS = ((1300, 700), (800, 400), (400, 200), (200, 100), (80, 40))
_ROOM = 600_000  # bytes of the page
SNIPPET = 160  # characters of a text in the line that opens it

Place = tuple[str, int]  # shard and row
Shelf = tuple[str, list[RankedWindow]]


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


def texts(windows: Path, shown: Sequence[RankedWindow]) -> dict[Place, Excerpt | None]:
    """Texts by shard and row, as long as there is room for on a page; None for windows given as token ids.

    Raises:
        OutputError: the windows are not those that were scored, or cannot be read.
    """
    found = excerpts(windows, {(window.shard, window.row): window.window_id for window in shown}, *_LENGTHS[0])
    for head, tail in _LENGTHS[1:]:
        if sum(_size(text) for text in found.values()) <= _ROOM:
            break
        found = {place: None if text is None else _shortened(text, head, tail) for place, text in found.items()}
    return found


def _shortened(text: Excerpt, head: int, tail: int) -> Excerpt:
    end = text.tail if text.left_out else text.head
    left_out = len(text.head) + len(text.tail) + text.left_out - head - tail
    return Excerpt(text.head[:head], end[-tail:], left_out) if left_out > 0 else text


def _size(text: Excerpt | None) -> int:
    """Bytes of it on the page, where a part of the head stands twice."""
    shown = "" if text is None else text.head + text.tail + text.head[:SNIPPET]
    return len(str(escape(plain(shown))).encode())


def all_windows(found: Mapping[str, Sequence[Shelf]]) -> list[RankedWindow]:
    """All windows of all groups' shelves."""
    return [window for some in found.values() for _, listed in some for window in listed]
