"""What the page's slider needs to say what any share would keep, in place of the scores of every window.

The slider has `STEPS` positions, the shares 1/STEPS to 1. At each of them the numbers are those of `longsift select`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longsift.distributions import Histogram, Sketch
from longsift.ranking import exact
from longsift.report.words import brief, plain
from longsift.selection import Choice, GroupChoice

STEPS = 1000


def slider(choice: Choice, shown: Sequence[GroupChoice], histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """The slider's data, as plain values.

    Its `groups` are `shown` and, where there are more, all others as one, whose name is None. Each has `step`,
    `windows`, `tokens` and `cut` (`longsift.distributions.Sketch`; steps as differences, and one number for `tokens`
    where all windows have as many), all windows and tokens of the group as `of`, and for a chart the counts of its
    bins, `front` and, of windows that stand behind, `behind`.
    """
    sketches = choice.sketches([group.group for group in shown], STEPS)
    totals: dict[str | None, tuple[int, int]] = {group.group: (group.windows, group.tokens) for group in shown}
    totals[None] = (
        choice.windows - sum(group.windows for group in shown),
        choice.tokens - sum(group.tokens for group in shown),
    )
    first = next(iter(histograms.values()), None)
    return {
        "steps": STEPS,
        "position": position(choice),
        "low": None if first is None else first.low,
        "high": None if first is None else first.high,
        "selected": _selected(choice, shown)[: len(sketches)],
        "groups": [
            {
                "name": None if name is None else brief(plain(name)),
                "of": totals[name],
                **_entries(sketch),
                **_bins(histograms.get(name or ""), name),
            }
            for name, sketch in sketches.items()
        ],
    }


def _selected(choice: Choice, shown: Sequence[GroupChoice]) -> list[dict[str, Any]]:
    """What is selected of each group shown and of all others together."""
    kept = sum(group.kept for group in shown)
    kept_tokens = sum(group.kept_tokens for group in shown)
    return [
        *({"windows": group.kept, "tokens": group.kept_tokens, "cut": group.cut} for group in shown),
        {"windows": choice.kept - kept, "tokens": choice.kept_tokens - kept_tokens, "cut": None},
    ]


def position(choice: Choice) -> int:
    """The slider's position nearest to what was selected."""
    share = choice.keep if choice.keep is not None else choice.kept / choice.windows if choice.windows else 0.0
    return min(max(round(exact(share) * STEPS), 1), STEPS)


def _entries(sketch: Sketch) -> dict[str, Any]:
    steps = [step - before for before, step in zip((0, *sketch.steps), sketch.steps, strict=False)]
    each = sketch.tokens[0] // sketch.windows[0] if sketch.steps else 0
    alike = all(tokens == each * windows for tokens, windows in zip(sketch.tokens, sketch.windows, strict=True))
    return {
        "step": steps,
        "windows": sketch.windows,
        "tokens": each if alike else sketch.tokens,
        "cut": [float(f"{cut:.6g}") for cut in sketch.cuts],
    }


def _bins(histogram: Histogram | None, name: str | None) -> dict[str, Any]:
    if histogram is None or name is None:
        return {}
    front = [count - behind for count, behind in zip(histogram.counts, histogram.behind, strict=True)]
    return {"front": front, "behind": histogram.behind if any(histogram.behind) else None}
