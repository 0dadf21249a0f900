"""`longsift evaluate` as a user runs it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from longsift.cli import app
from longsift.evaluation.evaluate import SCORES

ON_CPU = ["--device", "cpu", "--span", "16", "--window", "400", "--segment", "50", "--per-kind", "2", "-q"]
FEW = ["--kinds", "mixed,degenerate/uuids"]


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_prints_a_table_and_writes_a_page(model, corpus, tmp_path):
    done = run(corpus, "--model", model, "-o", tmp_path, *ON_CPU, *FEW)
    assert done.exit_code == 0, done.output
    assert all(score in done.stdout for score in SCORES if score != "calibrated")
    assert "code 6, mixed 5" in done.stdout
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000


def test_json_is_the_result(model, corpus, tmp_path):
    done = run(corpus, "--model", model, "-o", tmp_path, "--json", "--method", "longattn", *ON_CPU, *FEW)
    result = json.loads(done.stdout)
    assert {row["score"] for row in result["scores"]} == {"longattn", "longattn-strength"}
    assert result["calculator"]["kind"] == "first_layer"
    assert result == json.loads((tmp_path / "evaluation.json").read_text("utf-8"))


def test_dry_run_measures_nothing(model, corpus, tmp_path):
    done = run(corpus, "--model", model, "-o", tmp_path / "no", "--dry-run", "--json", *ON_CPU, *FEW)
    assert json.loads(done.stdout)["controls"] == 13
    assert not (tmp_path / "no").exists()


def test_needle_and_perplexity_judge_the_model_instead(model, corpus, tmp_path):
    needles = ["--needle", "--lengths", "450", "--depths", "0.5", "--trials", "2", "--candidates", "5"]
    done = run(corpus, "--model", model, "-o", tmp_path, "--json", "--perplexity", *needles, *ON_CPU)
    result = json.loads(done.stdout)
    assert len(result["needle"]) == 4
    assert result["perplexity"][0]["group"] == "code"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["needle.json", "perplexity.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "luck"], "not 'luck'"),
        (["--kinds", "mixd"], "no control 'mixd'"),
        (["--window", "100"], "is shorter than"),
        (["--segment", "250"], "does not fit twice"),
        (["--depths", "0,2"], "--depths is a list of numbers from 0 to 1"),
        (["--calibration", "x.json", "--method", "ladm"], "--calibration is for the method calibrated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_with_the_remedy(model, corpus, tmp_path, flags, message):
    done = run(corpus, "--model", model, "-o", tmp_path, *ON_CPU, *flags)
    assert done.exit_code == 2
    assert message in done.stderr
