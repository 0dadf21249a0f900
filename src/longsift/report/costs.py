"""What a run cost, and what more tokens would: time by stage, speed over time, hours for a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longsift.report.charts import axis, chart
from longsift.report.words import duration, number, tokens
from longsift.shards import RunFolder

PROJECTED = (1_000_000_000, 36_000_000_000)  # tokens; 36 B is what LongAttn's authors scored
_POINTS = 120  # of the speed over time, at most


def stages(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The stages that say how long they took: name, time, speed."""
    found = []
    cut, scores = manifest["windows"], manifest["scores"]
    if cut.get("seconds"):
        speed = f"{tokens(round(cut['counts']['tokens'] / cut['seconds']))} tokens of windows/s"
        found.append(("Reading and cutting", duration(cut["seconds"]), speed))
    counts = scores["counts"]
    if counts["seconds"]:
        speed = f"{tokens(round(counts['tokens'] / counts['seconds']))} tokens/s"
        found.append(("Scoring", duration(counts["seconds"]), speed))
    return found


def projections(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What more tokens would take at the run's own speed: tokens, time, hours of a device."""
    scores = manifest["scores"]
    counts, taken = scores["counts"], scores.get("device_seconds")
    if not counts["seconds"] or not counts["tokens"]:
        return []
    rows = []
    for total in PROJECTED:
        hours = None if taken is None else total * taken / counts["tokens"] / 3600
        rows.append(
            (
                tokens(total),
                duration(total * counts["seconds"] / counts["tokens"]),
                number(hours),
            )
        )
    return rows


def device(manifest: Mapping[str, Any]) -> str:
    """What the hours are hours of."""
    return "GPU" if manifest["scores"]["calculator"]["device"].startswith("cuda") else "CPU"


def speed(out: Path) -> dict[str, Any] | None:
    """A chart of tokens per second over the time of scoring, from the records of the shards; None with fewer than two.

    Shards are taken in the order in which their records were written.
    """
    folder = out / "shards" / "scores"
    records = RunFolder(out).records("scores")
    order = sorted(records, key=lambda shard: ((folder / f"{shard}.json").stat().st_mtime_ns, shard))
    points = _points([(records[shard]["tokens"], records[shard]["seconds"]) for shard in order])
    if len(points) < 2:
        return None
    end = points[-1][1]
    unit, seconds = ("hours", 3600) if end > 7200 else ("minutes", 60) if end > 120 else ("seconds", 1)
    return chart(
        "Tokens per second over the time of scoring",
        height=170,
        data={
            "values": [
                {"from": round(first / seconds, 4), "to": round(last / seconds, 4), "speed": round(speed, 1)}
                for first, last, speed in points
            ]
        },
        mark={"type": "rect", "tooltip": True},
        encoding={
            "x": axis("from", f"time of scoring, {unit}", scale={"nice": False}, axis={"format": ".4~g"}),
            "x2": {"field": "to"},
            "y": axis("speed", "tokens/s", axis={"format": ".3~s"}),
            "y2": {"datum": 0},
            "tooltip": [
                {"field": "speed", "title": "tokens/s", "format": ",.0f"},
                {"field": "from", "title": f"from, {unit}", "format": ".3~g"},
                {"field": "to", "title": f"to, {unit}", "format": ".3~g"},
            ],
        },
    )


def _points(records: Sequence[tuple[int, float]]) -> list[tuple[float, float, float]]:
    """Start and end in seconds of at most `_POINTS` spells of about the same length, and their speed."""
    total = sum(seconds for _, seconds in records)
    points: list[tuple[float, float, float]] = []
    begun, clock, done = 0.0, 0.0, 0
    for index, (count, seconds) in enumerate(records):
        clock, done = clock + seconds, done + count
        if clock > begun and (clock - begun >= total / _POINTS or index == len(records) - 1):
            points.append((begun, clock, done / (clock - begun)))
            begun, done = clock, 0
    return points
