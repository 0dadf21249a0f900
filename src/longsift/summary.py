"""A result, as the public functions return it, printed for a person: facts as lines, lists of rows as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def render(result: dict[str, Any]) -> None:
    """Print a result to stdout; nested dicts become headed blocks, lists of dicts become tables."""
    console = Console(highlight=False, soft_wrap=True)
    _block(console, result, "")


def _block(console: Console, block: dict[str, Any], heading: str) -> None:
    facts = {key: value for key, value in block.items() if not _is_nested(value) and value != []}
    if heading:
        console.print(f"\n[bold]{heading}[/bold]")
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        console.print(f"  {_words(key):<{width}}  {_value(value)}", markup=False)
    for key, value in block.items():
        if isinstance(value, dict) and value:
            _block(console, value, _words(key))
        elif isinstance(value, list) and _is_nested(value):
            _table(console, value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _table(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=True, header_style="dim")
    for number, (key, value) in enumerate(rows[0].items()):
        # The first column says what a row is of: where a table is too wide, the others are wrapped.
        table.add_column(_words(key), justify="left" if isinstance(value, str) else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(_value(value) for value in row.values()))
    console.print(table)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value)
