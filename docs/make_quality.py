"""Write the tables of docs/quality.md from benchmarks/results/quality.json: `python docs/make_quality.py`.

A test fails when they are out of date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("quality.md")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "quality.json"
BEGIN, END = "<!-- tables: docs/make_quality.py -->\n", "<!-- end of tables -->\n"
KINDS = ("mixed", "far-half", "pieces", "shuffled", "degenerate", "natural/concat", "natural/noise")


def render(page: str) -> str:
    """The page with its tables written anew."""
    tables = json.loads(RESULTS.read_text("utf-8"))["tables"]
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + "\n".join(_table(name, table) for name, table in tables.items()) + END + after


def _table(name: str, table: dict[str, Any]) -> str:
    scores = table["scores"]
    kinds = [kind for kind in KINDS if any(kind in score for score in scores.values())]
    lines = [f"### {name} tokens" if name[-1].isdigit() and "segment" not in name else f"### {name}", ""]
    lines += ["| score | " + " | ".join(kinds) + " | mixed, by group |", "|---" * (len(kinds) + 2) + "|"]
    for score, by_kind in scores.items():
        cells = [_cell(by_kind[kind]["mean"]) if kind in by_kind else "–" for kind in kinds]
        groups = ", ".join(f"{group} {values[0]:.2f}" for group, values in by_kind["mixed"].items() if group != "mean")
        lines.append(f"| {score} | " + " | ".join(cells) + f" | {groups} |")
    return "\n".join([*lines, ""])


def _cell(values: list[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.2f}–{values[2]:.2f})"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), encoding="utf-8")
