"""The figures of docs/quality.md are those of the results file."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quality.md").read_text("utf-8")
TABLES = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text("utf-8"))["tables"]


def test_the_tables_are_those_of_the_results_file():
    spec = importlib.util.spec_from_file_location("make_quality", ROOT / "docs" / "make_quality.py")
    assert spec is not None
    assert spec.loader is not None
    make_quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_quality)
    assert make_quality.render(PAGE) == PAGE, "run: python docs/make_quality.py"


@pytest.mark.parametrize(
    ("line", "table", "score", "kind"),
    [
        ("embedded + calibrated", "embedded valid 8192", "calibrated", "mixed"),
        ("embedded + calibrated", "embedded unseen-origins 8192", "calibrated", "mixed"),
        ("the same at 32,768", "embedded valid+unseen-origins 32768 segment 512", "calibrated", "mixed"),
        ("the same at 32,768", "embedded valid+unseen-origins 32768 segment 2048", "calibrated", "mixed"),
        ("SmolLM2-135M + calibrated", "SmolLM2-135M valid 8192", "calibrated, leave-one-category-out", "mixed"),
        (
            "SmolLM2-135M + calibrated",
            "SmolLM2-135M unseen-origins 8192",
            "calibrated, leave-one-category-out",
            "mixed",
        ),
        ("real above", "embedded valid 8192", "calibrated", "natural/noise"),
        ("real above", "embedded valid 8192", "calibrated", "natural/concat"),
        ("the same, SmolLM2", "SmolLM2-135M valid 8192", "calibrated", "natural/concat"),
        ("the same, SmolLM2", "SmolLM2-135M valid 8192", "calibrated with --control-groups", "natural/concat"),
    ],
)
def test_the_summary_states_the_measured_mean(line, table, score, kind):
    row = re.search(rf"^\| {re.escape(line)}.*$", PAGE, re.MULTILINE)
    assert row is not None
    assert f"{TABLES[table]['scores'][score][kind]['mean'][0]:.3f}" in row.group()


def test_the_shipped_calibration_has_the_stated_mean_over_kinds_left_out():
    path = ROOT / "src" / "longsift" / "calculators" / "embedded" / "calibration.json"
    fits = {fit["window"]: fit["figures"] for fit in json.loads(path.read_text("utf-8"))["fits"]}
    kinds = fits[8192]["unseen_kinds"]
    assert f"embedded {sum(kinds.values()) / len(kinds):.3f} (at 8,192)" in PAGE
    assert len(kinds) == 41
