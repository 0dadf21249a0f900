"""How another run, of another method say, ranks the same windows: a section of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longsift.comparison import Comparison, compare_runs
from longsift.report.compare import rank_chart
from longsift.selection import Choice


@dataclass(frozen=True)
class Agreement:
    """A comparison, whose one overlap is that at the cut, and its chart of ranks."""

    comparison: Comparison
    chart: dict[str, Any]


def agreement(out: Path, other: Path, choice: Choice) -> Agreement:
    """Compare the ranks of two runs, and the top share of each group that this one keeps.

    Raises:
        OutputError: the other has no scores of these windows.
    """
    share = choice.keep if choice.keep is not None else choice.kept / choice.windows if choice.windows else 0.0
    comparison = compare_runs(out, other, [share or 1.0])
    here = f"rank here ({comparison.a.method}), % of the group; 0 is the best"
    chart = rank_chart(comparison, here, f"rank there ({comparison.b.method}), %", 260)
    return Agreement(comparison, chart)
