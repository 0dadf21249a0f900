"""What a command prints for a person: tables of groups, histograms as a line of blocks, and no surprises from data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longsift.errors import OutputError
from longsift.measured import BINS, measured_groups
from longsift.rules import ScoreRule, Term
from longsift.summary import render, sparkline
from made_tables import STRENGTH, Row, write_tables
from test_pipeline import LONGATTN, as_json, longsift


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ([], ""),
        ([0, 0], "  "),
        ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
        ([1_000_000, 1, 0, 500_000], "█▁ ▄"),
        ([3], "█"),
    ],
    ids=str,
)
def test_a_histogram_is_a_line_of_blocks_in_which_only_empty_bins_are_empty(counts, line):
    assert sparkline(counts) == line
    ascii_line = sparkline(counts, unicode=False)
    assert ascii_line.isascii()
    assert [character == " " for character in ascii_line] == [character == " " for character in line]


def test_what_was_measured_is_told_by_group_as_numpy_tells_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    values = {"book": draw.normal(0.3, 0.1, 400), "web": draw.normal(0.5, 0.02, 90)}
    rows = [Row(group, float(x), n_tokens=10 + i % 3) for group in values for i, x in enumerate(values[group])]
    rows += [Row("web", None, status="failed"), Row("web", float("nan")), Row("none", None, status="failed")]
    write_tables(tmp_path, [rows[:300], rows[300:]])
    result = measured_groups(tmp_path / "scores", STRENGTH)
    assert result["measure"] == "dependency_strength"
    together = np.concatenate(list(values.values()))
    assert [result["low"], result["high"]] == pytest.approx(list(np.quantile(together, [0.005, 0.995])))
    assert [(g["group"], g["windows"], g["failed"]) for g in result["groups"]] == [
        ("book", 400, 0),
        ("none", 0, 1),
        ("web", 90, 2),
    ]
    for group in result["groups"]:
        if group["group"] == "none":
            assert (group["mean"], group["median"], group["histogram"], group["tokens"]) == (None, None, [], 0)
            continue
        x = values[group["group"]]
        assert group["mean"] == pytest.approx(x.mean())
        assert [group[name] for name in ("p10", "median", "p90")] == pytest.approx(
            list(np.quantile(x, [0.1, 0.5, 0.9]))
        )
        edges = np.linspace(result["low"], result["high"], BINS + 1)
        assert group["histogram"] == list(np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0])
        assert group["tokens"] == sum(
            row.n_tokens
            for row in rows
            if row.group == group["group"] and row.strength == row.strength and row.strength is not None
        )


def test_equal_measures_fill_one_bin(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(strength=0.25)] * 5])
    (group,) = measured_groups(tmp_path / "scores", STRENGTH)["groups"]
    assert group["histogram"] == [5] + [0] * (BINS - 1)


def test_scores_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    with pytest.raises(OutputError, match="could not be read"):
        measured_groups(tmp_path / "scores", ScoreRule((Term("loudness", 1.0),), "none"))


def test_scoring_ends_with_the_groups_and_their_histograms(corpus, model, tmp_path):
    flags = ["--model", model, *LONGATTN, "--window", 512, "--sample", 20, "-q"]
    result = as_json(longsift("score", corpus, "-o", tmp_path, *flags, "--json"))
    groups = result["distribution"]["groups"]
    assert [group["group"] for group in groups] == ["code", "mixed"]
    assert sum(sum(group["histogram"]) for group in groups) == result["windows"] == 20
    printed = longsift("score", tmp_path, *LONGATTN, "-q")
    for group in groups:
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [group["group"]]]
        assert sparkline(group["histogram"]).strip() in line
        assert line.split()[1:3] == [f"{group['windows']:,}", f"{group['tokens']:,}"]


def many_groups() -> list[dict]:
    return [{"group": f"g{i:02}", "windows": i % 29, "histogram": [i]} for i in range(58)]


def test_of_many_groups_the_largest_are_shown_and_the_others_counted(capsys):
    render({"groups": many_groups()})
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if line.strip().startswith("g") and "group" not in line]
    assert shown == [f"g{i:02}" for i in range(58) if i % 29 >= 19]
    assert "and 38 groups with fewer windows, which --json lists" in lines[-1]


def test_what_data_says_is_neither_markup_nor_obeyed_by_the_terminal(capsys):
    render({"name": "[bold]\x1b[31mred", "groups": [{"group": "[/nonsense]\x07\n", "windows": 1}]})
    printed = capsys.readouterr().out
    assert "[bold]\\x1b[31mred" in printed
    assert "[/nonsense]\\x07\\n" in printed


def test_a_terminal_without_unicode_gets_plain_characters():
    code = (
        "from longsift.summary import render; render({'a': None, 'groups': [{'group': 'é', 'histogram': [1, 5, 0]}]})"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout
    assert "a  -" in printed.decode("ascii")
    assert "\\xe9" in printed.decode("ascii")
    assert ":@" in printed.decode("ascii")
