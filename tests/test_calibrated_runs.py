"""Runs by the default method: resume, selection without the calibration file, and what an edited one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from longsift.calculators.full import FullModel
from longsift.methods.calibrated import Calibration, Feature, Fit
from longsift.shards import RunFolder
from longsift.tables import SCORE_KEYS
from test_pipeline import SMALL_SPANS, as_json, contents, longsift, run_in_background, table

WINDOW = ["--window", 512, "--shard-tokens", 4096]


@pytest.fixture(scope="module")
def calibration(model: Path, tmp_path_factory) -> Path:
    """Of the small model, made by hand."""
    features = (
        Feature(0, 1, "far", -0.7, 0.2, 1.0),
        Feature(1, 0, "near", -3.0, 0.5, -0.5, 0.1),
        Feature(1, 3, "weighted", -1.2, 0.3, 0.4, -0.2),
    )
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    Calibration(FullModel.load(str(model)).identity(), (Fit(512, 16, features),)).write(path)
    return path


@pytest.fixture
def own(calibration: Path, tmp_path: Path) -> Path:
    """A copy that a test may edit or remove."""
    return Path(shutil.copy(calibration, tmp_path / "own.json"))


def flags(corpus: Path, out: Path, model: Path, calibration: Path) -> list[object]:
    return [corpus, "-o", out, "--model", model, "--calibration", calibration, *WINDOW, "--keep", 0.5, "--overlap"]


@pytest.fixture(scope="module")
def finished(corpus: Path, model: Path, calibration: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    longsift("run", *flags(corpus, out, model, calibration), "-q")
    return out


def test_a_run_without_method_is_calibrated_and_keeps_the_highest(finished: Path) -> None:
    scores = table(finished / "scores")
    assert scores.schema.names == [*SCORE_KEYS.names, "calibrated", "far_focus"]
    by_id = dict(zip(scores["window_id"].to_pylist(), scores["calibrated"].to_pylist(), strict=True))
    selected = table(finished / "selected").to_pylist()
    assert {row["window_id"]: row["score"] for row in selected} == {
        r["window_id"]: by_id[r["window_id"]] for r in selected
    }
    for group in ("code", "mixed"):
        ids = [
            w for w, g in zip(scores["window_id"].to_pylist(), scores["group"].to_pylist(), strict=True) if g == group
        ]
        kept = [row["window_id"] for row in selected if row["group"] == group]
        assert sorted(kept, key=by_id.get) == sorted(ids, key=by_id.get)[-len(kept) :]
    manifest = RunFolder(finished).manifest()["scores"]["identity"]
    assert manifest["method"] == "calibrated"
    assert len(manifest["parameters"]["digest"]) == 16


def test_the_report_status_and_card_name_method_and_components(finished: Path, calibration: Path) -> None:
    page = (finished / "report.html").read_text("utf-8")
    assert f"<dd>calibrated, calibration {calibration}</dd>" in page
    assert "&#34;digest&#34;: " in page  # in the manifest's content
    assert "<dd>calibrated</dd>" in page  # the score, of which far focus is no part
    assert "<th>calibrated</th><th>far_focus</th>" in page
    assert as_json(longsift("status", finished, "--json"))["scores"]["method"] == "calibrated"
    card = (finished / "selected" / "README.md").read_text("utf-8")
    assert "calibrated" in card
    assert "Far focus of heads chosen on paired controls" in card


@pytest.mark.parametrize("how", [signal.SIGKILL], ids=["kill -9"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    finished: Path, corpus: Path, model: Path, calibration: Path, tmp_path: Path, how: signal.Signals
) -> None:
    command = ["run", *flags(corpus, tmp_path, model, calibration), "-q"]
    process = run_in_background(command)
    while process.poll() is None and not any((tmp_path / "scores").glob("*.parquet")):
        time.sleep(0.005)
    os.kill(process.pid, how)
    assert process.wait() == -how
    longsift(*command)
    for name in ("windows", "scores", "selected"):
        assert contents(tmp_path / name) == contents(finished / name)


def stop_half_way(out: Path) -> None:
    """Leave a finished run as one that was killed after its first shard of scores."""
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    scores = {key: manifest["scores"][key] for key in ("started", "identity")} | {"status": "running"}
    (out / "manifest.json").write_text(json.dumps({**manifest, "scores": scores}), "utf-8")
    for shard in sorted((out / "scores").glob("*.parquet"))[1:]:
        shard.unlink()
        (out / "shards" / "scores" / f"{shard.stem}.json").unlink()


def test_a_calibration_that_was_edited_since_the_stop_is_refused_and_overwrite_scores_anew(
    finished: Path, corpus: Path, model: Path, own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", *flags(corpus, out, model, own), "-q"]
    longsift(*command)
    assert table(out / "scores") == table(finished / "scores")
    stop_half_way(out)
    own.write_text(own.read_text("utf-8").replace('"weight": 1.0', '"weight": 2.0'), "utf-8")
    message = longsift(*command, code=1)
    assert "holds scores of another run (parameters.digest: " in message
    assert len(list((out / "scores").glob("*.parquet"))) == 1
    longsift("score", out, "--calibration", own, "--overwrite", "-q")
    assert table(out / "scores")["far_focus"] == table(finished / "scores")["far_focus"]
    assert table(out / "scores")["calibrated"] != table(finished / "scores")["calibrated"]


def test_selecting_and_reporting_need_no_calibration_file(corpus: Path, model: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    longsift("run", *flags(corpus, out, model, own), "-q")
    own.unlink()
    assert as_json(longsift("select", out, "--keep", 0.25, "--json"))["kept"] > 0
    longsift("report", out)
    longsift("status", out)
    assert "own.json" in longsift("score", out, "--calibration", own, "-q", code=2)


def test_other_methods_score_its_windows_elsewhere(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "ladm"
    longsift("score", finished, "-o", out, "--method", "ladm", *SMALL_SPANS, "-q")
    assert table(out / "scores")["window_id"] == table(finished / "scores")["window_id"]
    assert as_json(longsift("select", out, "--keep", 0.5, "--json"))["kept"] > 0


def test_windows_of_a_calculator_without_calibration_are_refused_and_lose_nothing(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for flags in ([], ["--overwrite"], ["--dry-run"]):
        assert "longsift calibrate CORPUS --model" in longsift("score", finished, "-o", out, *flags, "-q", code=2)
    assert not out.exists()


def test_a_dry_run_measures_one_window(corpus: Path, model: Path, calibration: Path, tmp_path: Path) -> None:
    plan = as_json(longsift("run", *flags(corpus, tmp_path / "o", model, calibration), "--dry-run", "--json"))
    assert plan["seconds_scoring"] > 0
    assert not (tmp_path / "o").exists()


def test_documents_shorter_than_the_embedded_calculators_window_are_counted(corpus: Path, tmp_path: Path) -> None:
    """Without --window it takes windows of 32,768 tokens, which none of these documents has."""
    output = longsift("run", corpus, "-o", tmp_path, "-q", code=1)
    assert "of 12 documents 12 are too short" in output
    assert RunFolder(tmp_path).manifest()["windows"]["length"] == 32_768
