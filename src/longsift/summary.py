"""A result, as the public functions return it, printed for a person: facts as lines, lists of rows as tables."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 200  # of lines that go to a file, where nothing is to be cut short
_GROUPS = 20  # rows of a table of groups; those with most windows
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what a terminal would obey
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"


def render(result: dict[str, Any]) -> None:
    """Print a result to stdout; nested dicts become headed blocks, lists of dicts tables, histograms a line of blocks.

    A terminal that cannot show a character, since its encoding is not UTF-8, gets an escape for it.
    """
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(highlight=False, markup=False, soft_wrap=True, width=width)
    if isinstance(sys.stdout, io.TextIOWrapper) and not _unicode(console):
        sys.stdout.reconfigure(errors="backslashreplace")
    _block(console, result, "")


def sparkline(counts: list[int], *, unicode: bool = True) -> str:
    """A histogram as one character a bin, as high as its count; a space where there is none."""
    levels = _BLOCKS if unicode else _ASCII
    most = max(counts, default=0)
    # The least count shows: only the empty bins are empty.
    return "".join(levels[(count * len(levels) - 1) // most] if count else " " for count in counts)


def _block(console: Console, block: dict[str, Any], heading: str) -> None:
    facts = {key: value for key, value in block.items() if not _is_nested(value) and value != []}
    if heading:
        console.print(f"\n{heading}", style="bold")
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        console.print(f"  {_words(key):<{width}}  {_value(console, value)}")
    for key, value in block.items():
        if isinstance(value, dict) and value:
            _block(console, value, _words(key))
        elif isinstance(value, list) and _is_nested(value):
            _table(console, value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _table(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=True, header_style="dim")
    shown = _largest(rows)
    for number, (key, value) in enumerate(rows[0].items()):
        # The first column says what a row is of: where a table is too wide, the others are wrapped.
        line = key == "histogram"
        table.add_column(
            _words(key),
            justify="left" if isinstance(value, str) or line else "right",
            no_wrap=number == 0 or line,
        )
    for row in shown:
        table.add_row(
            *(
                sparkline(value, unicode=_unicode(console)) if key == "histogram" else _value(console, value)
                for key, value in row.items()
            )
        )
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"  and {len(rows) - len(shown):,} groups with fewer windows, which --json lists")


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of many groups those with most windows, in their order, and what is no group: rows without a count."""
    if len(rows) <= _GROUPS or not {"group", "windows"} <= set(rows[0]):
        return rows
    counts = sorted((row["windows"] for row in rows if row["windows"] is not None), reverse=True)
    least = counts[min(_GROUPS, len(counts)) - 1]
    more = sum(count > least for count in counts)
    shown = []
    for row in rows:
        if row["windows"] is None or row["windows"] > least:
            shown.append(row)
        elif row["windows"] == least and more < _GROUPS:
            shown.append(row)
            more += 1
    return shown


def _words(key: str) -> str:
    return key.replace("_", " ")


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _value(console: Console, value: Any) -> str:
    if value is None:
        return "–" if _unicode(console) else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_value(console, item) for item in value)
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(value))
