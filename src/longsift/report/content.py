"""What a report says of a run in words and counts: its facts, its funnel, what was left out, its manifest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from longsift.report.words import duration, scaled, share, tokens
from longsift.selection import Choice
from longsift.tables import parquet_files

_REASONS = 20
_EXAMPLES = 3  # of each reason
_MANIFEST = 40_000  # characters that are shown
_RULES = ("alpha", "normalize", "layer_aggregation")  # parameters that `longsift select` can change


def facts(manifest: Mapping[str, Any], choice: Choice) -> Iterator[tuple[str, str]]:
    """What was run, on what and how fast, as pairs of a label and a text."""
    windows, scores, identity = manifest["windows"], manifest["scores"], manifest["selected"]["identity"]
    calculator, counts = scores["calculator"], scores["counts"]
    parameters = "".join(
        f", {key} {value}"
        for key, value in identity["parameters"].items()
        if value is not None and value is not False and key != "digest"
    )
    yield "Method", identity["method"] + parameters
    yield "Score", choice.rule.describe()
    revision = calculator.get("revision")
    yield "Calculator", calculator["model"] + (f" @ {revision[:12]}" if revision else "")
    yield "Window", f"{windows['length']:,} tokens" if windows.get("length") else "as given"
    yield "Groups by", windows["identity"].get("group_by") or "source, where present"
    yield "Kept", _request(choice)
    took = f", in {duration(counts['seconds'])}" if counts["seconds"] else ""
    yield "Scored", datetime.fromtimestamp(scores["finished"], UTC).strftime("%Y-%m-%d %H:%M UTC") + took
    yield "On", f"{calculator['device']}, {calculator['dtype']}"
    if counts["seconds"]:
        yield "Speed", f"{counts['tokens'] / counts['seconds']:,.0f} tokens a second"
    inputs = windows["identity"].get("inputs", [])
    if inputs:
        size = sum(size or 0 for _, size, *_ in inputs)
        others = f" and {len(inputs) - 1:,} more" if len(inputs) > 1 else ""
        yield "Input", f"{inputs[0][0]}{others}, {scaled(size, 'B')}"
    yield "Made with", f"longsift {manifest['longsift']}"


def _request(choice: Choice) -> str:
    text = f"{share(choice.keep)} of every group, rounded up" if choice.keep is not None else ""
    if choice.budget is not None:
        text = f"{tokens(choice.budget)} tokens"
    if choice.mix is not None:
        text = f"{text.replace(' of every group, rounded up', ' of all tokens')}: " + ", ".join(
            f"{group} {share(part)}" for group, part in choice.mix.items()
        )
    return text


def command(out: Path, manifest: Mapping[str, Any]) -> str:
    """The command that selects from this run as this selection did, but for its share: `--keep` is to follow."""
    identity = manifest["selected"]["identity"]
    scored = manifest["scores"].get("identity", identity)["parameters"]
    words = ["longsift", "select", str(out)]
    if identity.get("overlap", True):
        words.append("--overlap")
    if identity.get("dedup"):
        words += ["--dedup", identity["dedup"]]
    for name in _RULES:
        value = identity["parameters"].get(name)
        if value != scored.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as text, its beginning where it is long, as that of a hundred thousand input files is."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    if len(text) <= _MANIFEST:
        return text
    return f"{text[:_MANIFEST]}\n… {len(text) - _MANIFEST:,} more characters in manifest.json"


@dataclass(frozen=True)
class Stage:
    """One line of the funnel; `lost` marks what does not go on."""

    label: str
    count: int
    tokens: int | None
    share: float
    lost: bool = False


def funnel(manifest: Mapping[str, Any], choice: Choice) -> list[tuple[str, list[Stage]]]:
    """How many documents and windows came how far."""
    counts = manifest["windows"]["counts"]
    rows = counts["documents"] + counts["bad_rows"]
    cut = counts.get("windows_before_sample", counts["windows"])
    aside = manifest["scores"].get("set_aside", {}).get("windows", 0)

    def documents(label: str, count: int, tokens: int | None = None, lost: bool = False) -> Stage:
        return Stage(label, count, tokens, count / rows if rows else 0.0, lost)

    def windows(label: str, count: int, tokens: int | None = None, lost: bool = False) -> Stage:
        return Stage(label, count, tokens, count / cut if cut else 0.0, lost)

    sampled = [windows("Drawn as a sample", counts["windows"], counts["tokens"])] if cut != counts["windows"] else []
    return [
        (
            "Documents",
            [
                documents("Read", rows),
                documents("Quarantined", counts["bad_rows"], lost=True),
                documents("Too short", counts["too_short"], counts.get("too_short_tokens"), lost=True),
                documents("Cut into windows", counts["documents"] - counts["too_short"]),
            ],
        ),
        (
            "Windows",
            [
                windows("Cut", cut, None if sampled else counts["tokens"]),
                *sampled,
                *([windows("In shards set aside", aside, lost=True)] if aside else []),
                windows("Failed", choice.failed, lost=True),
                *([windows("Same tokens as another", choice.duplicates, lost=True)] if choice.duplicates else []),
                windows("Scored", choice.windows, choice.tokens),
                *([windows("Overlap a better one", choice.passed_over, lost=True)] if choice.passed_over else []),
                windows("Selected", choice.kept, choice.kept_tokens),
            ],
        ),
    ]


def unit(choice: Choice) -> str:
    """What a score is measured in."""
    if choice.rule.normalize == "zscore":
        return "standard deviations within the group"
    if choice.rule.normalize == "minmax":
        return "share of the group's range"
    return " + ".join(term.column for term in choice.rule.terms if term.weight)


def failures(manifest: Mapping[str, Any], choice: Choice) -> list[dict[str, Any]]:
    """The commonest reasons why windows were not scored, each with its count and first examples."""
    counts = dict(list(manifest["scores"].get("reasons", {}).items())[:_REASONS])
    examples = choice.failures(list(counts), _EXAMPLES) if counts else {}
    return [
        {"reason": reason, "count": count, "examples": examples.get(reason, [])} for reason, count in counts.items()
    ]


def quarantine(folder: Path) -> list[dict[str, Any]]:
    """The commonest reasons why rows were not read, each with its count and first examples."""
    paths = [str(path) for path in parquet_files(folder)]
    if not paths:
        return []
    with duckdb.connect() as database:
        rows = database.execute(
            """SELECT reason, file, row, excerpt, number, total FROM (
                   SELECT *, row_number() OVER (PARTITION BY reason ORDER BY file, row) AS number,
                          count(*) OVER (PARTITION BY reason) AS total
                   FROM read_parquet(?))
               WHERE number <= ? ORDER BY total DESC, reason, number LIMIT ?""",
            [paths, _EXAMPLES, _EXAMPLES * _REASONS],
        ).fetchall()
    reasons: dict[str, dict[str, Any]] = {}
    for reason, file, row, excerpt, _, total in rows:
        entry = reasons.setdefault(reason, {"reason": reason, "count": total, "examples": []})
        entry["examples"].append({"file": file, "row": row, "excerpt": excerpt})
    return list(reasons.values())[:_REASONS]
