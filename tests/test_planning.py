"""--dry-run: what it says of a corpus of which it reads a part, and how little it measures."""

from __future__ import annotations

import json

import pytest

from longsift import planning
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.planning import estimate
from longsift.scoring import Scorer

LONGATTN = ScoreOptions(method="longattn", device="cpu")


def test_a_part_of_a_large_file_tells_how_many_documents_it_has(model, tmp_path):
    row = json.dumps({"input_ids": list(range(100)), "note": "x" * 10_000})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 1000)
    plan = estimate([str(tmp_path)], ModelOptions(model=str(model)), WindowOptions(), LONGATTN)
    assert plan["bytes_looked_at"] < plan["bytes"] / 2
    assert plan["documents"] == pytest.approx(1000, rel=0.01)


def test_of_a_window_that_takes_long_only_the_beginning_is_measured(corpus, model, monkeypatch):
    lengths = []
    measure = Scorer.measure

    def spy(self, input_ids):
        lengths.append(len(input_ids))
        return measure(self, input_ids)

    monkeypatch.setattr(Scorer, "measure", spy)
    monkeypatch.setattr(planning, "_TOKENS", 256)
    for seconds, measured in ((0.0, [256] * 2), (1e9, [256] * 2 + [512] * 2 + [1024] * 2)):
        lengths.clear()
        monkeypatch.setattr(planning, "_SECONDS", seconds)
        plan = estimate([str(corpus)], ModelOptions(model=str(model)), WindowOptions(window=1024), LONGATTN)
        assert lengths == measured
        assert plan["seconds_scoring"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"])


@pytest.mark.parametrize(
    ("token", "pair"), [(1e-4, 0.0), (1e-4, 1e-8), (0.0, 1e-8)], ids=["tokens", "both", "pairs of tokens"]
)
def test_the_time_of_a_window_is_what_its_beginnings_tell(model, monkeypatch, token, pair):
    monkeypatch.setattr(planning, "_seconds", lambda scorer, ids, length, **_: token * length + pair * length**2)
    scorer = Scorer.from_options(ModelOptions(model=str(model)), LONGATTN)
    plan = planning._scoring(scorer, list(range(1 << 15)), 1 << 20)
    assert plan["seconds_scoring"] == pytest.approx(32 * (token * 2**15 + pair * 2**30))


def test_a_dry_run_of_a_thousand_files_reads_a_few_and_measures_two_lengths(model, tmp_path, monkeypatch):
    text = "def far(n):\n    return n\n" * 600
    for i in range(1000):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    lengths = []
    monkeypatch.setattr(planning, "_seconds", lambda scorer, ids, length, **_: lengths.append(length) or 0.3)
    plan = estimate([str(tmp_path)], ModelOptions(model=str(model)), WindowOptions(window=2048), LONGATTN)
    assert (plan["sources"], plan["documents"]) == (1000, 1000)
    assert plan["bytes_looked_at"] * 250 == plan["bytes"]
    assert lengths == [1024, 2048]
