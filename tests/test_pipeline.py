"""The stages together, through the command line: what a run writes, and what a stop, a restart or bad input does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from longsift.cli import app
from longsift.shards import RunFolder
from longsift.tables import QUARANTINE, SCORE_KEYS, WINDOWS, parquet_files

LONGATTN = ["--method", "longattn"]
SMALL_SPANS = ["--span", "16", "--d-afs", "2", "--d-cds", "2"]


def longsift(*arguments: object, code: int = 0) -> str:
    """Run a command in this process; returns what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def as_json(output: str) -> dict:
    return json.loads(output[output.index("{") : output.rindex("}") + 1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in parquet_files(folder)}


def table(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in parquet_files(folder)])


@pytest.fixture(scope="module")
def finished(corpus, model, tmp_path_factory) -> Path:
    """A finished LongAttn run, with shards of a few windows."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ["--model", model, *LONGATTN, "--window", 512, "--shard-tokens", 4096, "--keep", 0.5]
    longsift("run", corpus, "-o", out, *flags, "-q")
    return out


@pytest.mark.parametrize(
    ("method", "flags", "columns"),
    [
        ("longattn", [], ["dependency_strength", "variance"]),
        ("longattn", ["--detail"], ["dependency_strength", "variance", "dependency_strength_heads", "variance_heads"]),
        ("ladm", SMALL_SPANS, ["cds", "cds_layers", "layers"]),
    ],
    ids=["longattn", "longattn-detail", "ladm"],
)
def test_run_turns_documents_into_a_selected_data_set_and_a_report(corpus, model, tmp_path, method, flags, columns):
    arguments = [corpus, "-o", tmp_path, "--model", model, "--window", 512, "--method", method, *flags]
    result = as_json(longsift("run", *arguments, "--keep", 0.25, "--group-by", "source", "--json", "-q"))
    windows, scores, selected = (table(tmp_path / name) for name in ("windows", "scores", "selected"))
    assert windows.schema == WINDOWS
    assert scores.schema.names == [*SCORE_KEYS.names, *columns]
    assert scores["status"].unique().to_pylist() == ["ok"]
    assert scores["window_id"] == windows["window_id"]
    assert set(windows["n_tokens"].to_pylist()) == {512}
    assert result["windows"]["documents"] == 12
    assert result["windows"]["too_short"] == 1
    for group in ("code", "mixed"):
        ids = [w for w, g in zip(*(windows[c].to_pylist() for c in ("window_id", "group")), strict=True) if g == group]
        kept = [
            r for r, g in zip(selected["rank"].to_pylist(), selected["group"].to_pylist(), strict=True) if g == group
        ]
        assert sorted(kept) == list(range(1, -(-len(ids) // 4) + 1))
    assert (tmp_path / "report.html").stat().st_size > 0
    assert RunFolder(tmp_path).manifest()["scores"]["identity"]["method"] == method


def test_selected_rows_carry_text_ids_and_metadata_of_their_documents(finished, corpus):
    documents = [json.loads(line) for file in sorted(corpus.iterdir()) for line in file.open(encoding="utf-8")]
    by_id = {document["id"]: document for document in documents}
    for row in table(finished / "selected").to_pylist():
        document = by_id[row["doc_id"]]
        assert row["text"] in document["text"]
        assert len(row["input_ids"]) == row["n_tokens"] == 512
        assert row["stars"] == document["stars"]
        assert row["source"] == row["group"] == document["source"]


def test_the_same_command_again_does_nothing_and_select_scores_nothing_again(finished, corpus, model):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.suffix == ".parquet"}
    longsift("windows", corpus, "-o", finished, "--model", model, "--window", 512, "--shard-tokens", 4096, "-q")
    longsift("score", finished, *LONGATTN, "-q")
    kept = [as_json(longsift("select", finished, "--keep", keep, "--json"))["kept"] for keep in (0.1, 0.5)]
    assert kept[0] < kept[1]
    for path, when in before.items():
        if path.parent.name != "selected":
            assert path.stat().st_mtime_ns == when


def run_in_background(arguments: list[object]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "longsift.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
@pytest.mark.parametrize("stage", ["windows", "scores"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(finished, corpus, model, tmp_path, stage, how):
    arguments = [
        "run",
        corpus,
        "-o",
        tmp_path,
        "--model",
        model,
        *LONGATTN,
        "--window",
        512,
        "--shard-tokens",
        4096,
        "--keep",
        0.5,
    ]
    process = run_in_background([*arguments, "-q"])
    while process.poll() is None and not any((tmp_path / stage).glob("*.parquet")):
        time.sleep(0.005)
    os.kill(process.pid, how)
    code = process.wait()
    assert code in ((-signal.SIGKILL,) if how == signal.SIGKILL else (130, 0))
    longsift(*arguments, "-q")
    for name in ("windows", "scores", "selected"):
        assert contents(tmp_path / name) == contents(finished / name)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_stop_between_the_last_source_and_the_end_of_the_stage_loses_nothing(corpus, model, tmp_path):
    arguments = ["windows", corpus, "-o", tmp_path, "--model", model, "--window", 512, "-q"]
    longsift(*arguments)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stopped = {key: manifest["windows"][key] for key in ("started", "identity")} | {"status": "running"}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "windows": stopped}))
    longsift(*arguments)
    again = json.loads((tmp_path / "manifest.json").read_text())["windows"]
    for key in ("tokenizer", "length", "counts"):
        assert again[key] == manifest["windows"][key]
    assert again["tokenizer"]


def test_a_scores_file_that_vanished_is_made_again(corpus, model, tmp_path):
    flags = ["--model", model, "--window", 512, "--shard-tokens", 4096, "-q"]
    longsift("score", corpus, "-o", tmp_path, *LONGATTN, *flags)
    whole = contents(tmp_path / "scores")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["scores"]["status"] = "running"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    next((tmp_path / "scores").glob("*.parquet")).unlink()
    longsift("score", corpus, "-o", tmp_path, *LONGATTN, *flags)
    assert contents(tmp_path / "scores") == whole


def test_a_second_run_in_the_same_folder_is_told_so(finished):
    with RunFolder(finished).lock():
        process = subprocess.run(
            [sys.executable, "-m", "longsift.cli", "select", str(finished)], capture_output=True, text=True, check=False
        )
    assert process.returncode == 1
    assert f"Another longsift (process {os.getpid()}) is writing" in process.stderr


def test_other_parameters_need_another_folder_or_overwrite(corpus, model, tmp_path):
    arguments = ["windows", corpus, "-o", tmp_path, "--model", model, "-q"]
    longsift(*arguments, "--window", 512)
    assert "window: 512 → 256" in longsift(*arguments, "--window", 256, code=1)
    longsift(*arguments, "--window", 256, "--overwrite")
    assert set(table(tmp_path / "windows")["n_tokens"].to_pylist()) == {256}


def test_windows_of_one_run_are_scored_by_another_method_elsewhere(finished, tmp_path):
    out = tmp_path / "ladm"
    longsift("score", finished, "-o", out, "--method", "ladm", *SMALL_SPANS, "-q")
    assert not (out / "windows").exists()
    assert table(out / "scores")["window_id"] == table(finished / "scores")["window_id"]
    assert as_json(longsift("select", out, "--keep", 0.5, "--json"))["kept"] > 0
    longsift("report", out)
    assert as_json(longsift("status", out, "--json"))["scores"]["state"] == "done"


def test_ladm_is_selected_by_standardised_layers_without_scoring_again(finished, tmp_path):
    out = tmp_path / "ladm"
    longsift("score", finished, "-o", out, "--method", "ladm", *SMALL_SPANS, "-q")
    before = contents(out / "scores")
    longsift("select", out, "--keep", 1.0, "--layer-aggregation", "zscore", "-q")
    assert contents(out / "scores") == before
    scored = {row["window_id"]: row for row in table(out / "scores").to_pylist()}
    for group in ("code", "mixed"):
        layers = {window: row["cds_layers"] for window, row in scored.items() if row["group"] == group}
        values = np.array(list(layers.values()))
        assert values.shape[1] > 1
        expected = ((values - values.mean(0)) / values.std(0)).mean(1)
        selected = {
            row["window_id"]: row["score"] for row in table(out / "selected").to_pylist() if row["group"] == group
        }
        assert selected == pytest.approx(dict(zip(layers, expected, strict=True)), rel=1e-6, abs=1e-9)
    assert RunFolder(out).manifest()["selected"]["identity"]["parameters"]["layer_aggregation"] == "zscore"
    assert "mean(Z(cds_layers))" in (out / "selected" / "README.md").read_text("utf-8")
    longsift("report", out)
    assert "mean(Z(cds_layers))" in (out / "report.html").read_text("utf-8")


def test_a_window_has_the_same_score_whatever_is_scored_beside_it(finished, model, tmp_path):
    rows = table(finished / "windows").select(["doc_id", "input_ids"]).rename_columns(["id", "input_ids"])
    pq.write_table(rows.slice(3, 1), tmp_path / "one.parquet")
    longsift("score", tmp_path / "one.parquet", "-o", tmp_path / "out", "--model", model, *LONGATTN, "-q")
    alone = table(tmp_path / "out" / "scores").to_pylist()[0]
    among = table(finished / "scores").to_pylist()[3]
    assert (alone["dependency_strength"], alone["variance"]) == (among["dependency_strength"], among["variance"])


BAD_LINES = {
    "not JSON": b'{"text": "cut off',
    "not an object": b'["text"]',
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "no text": b'{"id": "x"}',
    "text is a number": b'{"text": 7}',
    "text is null": b'{"text": null}',
    "empty text": b'{"text": ""}',
    "blank text": b'{"text": " \\n\\t"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "ids of the wrong type": b'{"input_ids": ["a"]}',
    "negative id": b'{"input_ids": [1, -1]}',
}


def test_bad_rows_are_set_aside_with_file_and_row_and_lose_nothing_else(corpus, model, tmp_path):
    good = (corpus / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines = [line + b"\n" for line in BAD_LINES.values()]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join([*good[:2], *lines, *good[2:]]))
    arguments = ["run", file, "--model", model, *LONGATTN, "--window", 512, "-q"]

    output = longsift(*arguments, "-o", tmp_path / "strict", code=1)
    assert f"{len(BAD_LINES)} of {len(BAD_LINES) + len(good)} rows are bad" in output
    assert (tmp_path / "strict" / "report.html").exists()
    bad = table(tmp_path / "strict" / "quarantine")
    assert bad.schema == QUARANTINE
    assert bad["file"].unique().to_pylist() == [str(file)]
    assert bad["row"].to_pylist() == list(range(2, 2 + len(BAD_LINES)))
    assert all(bad["reason"].to_pylist())

    longsift(*arguments, "-o", tmp_path / "lenient", "--max-bad", 0.9)
    longsift("run", corpus / "a.jsonl", *arguments[2:], "-o", tmp_path / "clean")
    for folder in ("strict", "lenient"):
        assert contents(tmp_path / folder / "windows") == contents(tmp_path / "clean" / "windows")


def test_a_window_that_cannot_be_scored_is_a_failed_row_with_its_reason(model, tmp_path):
    rows = [{"input_ids": list(range(100))}, {"input_ids": [1, 2, 3]}, {"input_ids": [5, 100_000] * 50}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", model, *LONGATTN, "-q"]
    output = longsift("score", tmp_path / "ids.jsonl", "-o", tmp_path / "out", *flags, code=1)
    assert "2 of 3 windows could not be scored" in output
    scores = table(tmp_path / "out" / "scores").to_pylist()
    assert [row["status"] for row in scores] == ["ok", "failed", "failed"]
    assert scores[1]["reason"] == "shorter than the 4 tokens that longattn needs"
    assert "100000" in scores[2]["reason"].replace(",", "")
    assert scores[1]["dependency_strength"] is None


def test_a_sample_is_the_same_windows_from_one_file_or_many(corpus, model, tmp_path):
    (tmp_path / "whole.jsonl").write_bytes(b"".join(path.read_bytes() for path in sorted(corpus.iterdir())))
    flags = ["--model", model, "--window", 256, "--sample", 10, "--seed", 3, "-q"]
    longsift("windows", corpus, "-o", tmp_path / "many", *flags)
    counts = as_json(longsift("windows", tmp_path / "whole.jsonl", "-o", tmp_path / "one", *flags, "--json"))
    many, one = (table(tmp_path / name / "windows")["window_id"].to_pylist() for name in ("many", "one"))
    assert many == one
    assert counts["windows"] == len(one) == 10
    longsift("windows", corpus, "-o", tmp_path / "other", *flags, "--seed", 4)
    assert table(tmp_path / "other" / "windows")["window_id"].to_pylist() != one


def test_limit_counts_documents_over_all_files(corpus, model, tmp_path):
    counts = as_json(
        longsift("windows", corpus, "-o", tmp_path, "--model", model, "--window", 512, "--limit", 7, "--json", "-q")
    )
    assert counts["documents"] == 7


@pytest.mark.parametrize(
    ("flags", "line"),
    [(["--text-key", "content"], '{{"content": {text}}}'), (["--tab-ids"], 'Prefix_0000001\t{{"text": {text}}}')],
    ids=["content", "id-tab-json"],
)
def test_the_published_formats_read_with_flags(model, tmp_path, flags, line):
    text = json.dumps("def far(n):\n    return n\n" * 400)
    (tmp_path / "rows.jsonl").write_text(line.format(text=text) + "\n")
    longsift(
        "windows", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "--model", model, "--window", 512, *flags, "-q"
    )
    rows = table(tmp_path / "out" / "windows").to_pylist()
    assert rows
    assert rows[0]["doc_id"] == ("Prefix_0000001" if "--tab-ids" in flags else "rows:0")


def test_a_calculator_with_another_tokenizer_is_refused(finished, tmp_path):
    output = longsift("score", finished, "-o", tmp_path / "out", "--model", "embedded", *LONGATTN, "-q", code=2)
    assert "does not share" in output


@pytest.mark.parametrize("command", ["run", "score"])
def test_layers_that_the_calculator_does_not_have_are_refused_before_documents_are_cut(
    command: str, corpus, model, tmp_path
):
    flags = ["-o", tmp_path / "out", "--model", model, "--method", "ladm", "--layers", "1,99"]
    output = longsift(command, corpus, *flags, "-q", code=2)
    assert "--layers [1, 99]" in output
    assert "has the layers 0 to 2" in output
    assert not (tmp_path / "out").exists()


def test_a_mix_of_groups_that_were_not_cut_is_refused_before_windows_are_scored(corpus, model, tmp_path):
    flags = [corpus, "-o", tmp_path / "out", "--model", model, *LONGATTN, "--window", 512, "-q"]
    output = longsift("run", *flags, "--mix", "code=0.5,books=0.5", code=2)
    assert "--mix names groups of which there is no window: books. There are: code, mixed." in output
    assert not list((tmp_path / "out").glob("scores/*.parquet"))
    longsift("run", *flags, "--mix", "code=0.5")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--window", 256], "--window 256"),
        (["--text-key", "body"], "--text-key body"),
        (["--limit", 2], "--limit 2"),
        (["--sample", 3], "--sample 3"),
        (["--window", 256, "--dry-run"], "--window 256"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_would_cut_other_windows_are_refused_where_windows_are_scored(finished, flags, named, tmp_path):
    output = longsift("score", finished, "-o", tmp_path / "out", *LONGATTN, *flags, "-q", code=2)
    assert f"{named} would cut other windows than those of {finished}" in output
    assert not (tmp_path / "out").exists()


def test_options_that_the_windows_were_cut_with_may_be_named_again(finished, tmp_path):
    length = RunFolder(finished).section("windows")["length"]
    flags = ["--window", length, "--cut-workers", 1, "--max-bad", 1, "--shard-tokens", 1 << 20]
    longsift("score", finished, "-o", tmp_path / "out", *LONGATTN, *flags, "-q")


def test_a_dry_run_says_how_much_there_is_and_writes_nothing(corpus, model, tmp_path):
    flags = [corpus, "-o", tmp_path / "out", "--model", model, "--window", 512]
    plan = as_json(longsift("run", *flags, *LONGATTN, "--dry-run", "--json"))
    counts = as_json(longsift("windows", *flags, "--json", "-q"))
    assert {name: plan[name] for name in ("documents", "too_short", "windows", "tokens")} == {
        name: counts[name] for name in ("documents", "too_short", "windows", "tokens")
    }
    assert plan["seconds_scoring"] > 0
    assert not (tmp_path / "out" / "scores").exists()


def test_another_selection_is_another_data_set_to_load_dataset_and_another_report(corpus, model, tmp_path):
    flags = ["--model", model, *LONGATTN, "--window", 256, "--keep", 0.2]
    longsift("run", corpus, "-o", tmp_path / "o", *flags, "-q")
    loaded = []
    for keep in (0.2, 0.6):
        kept = as_json(longsift("select", tmp_path / "o", "--keep", keep, "--json"))["kept"]
        folder, cache = str(tmp_path / "o" / "selected"), str(tmp_path / "cache")
        loaded.append(len(datasets.load_dataset(folder, split="train", cache_dir=cache)))
        assert loaded[-1] == kept
        assert f"{kept} of " in (tmp_path / "o" / "report.html").read_text()
    assert loaded[0] < loaded[1]


def test_an_input_that_changed_is_noticed_even_at_the_same_size(corpus, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes((corpus / "a.jsonl").read_bytes())
    arguments = ["windows", file, "-o", tmp_path / "o", "--model", model, "--window", 512, "-q"]
    longsift(*arguments)
    file.write_bytes((corpus / "a.jsonl").read_bytes().replace(b"def", b"fed"))
    os.utime(file, (1, 1))
    assert "inputs:" in longsift(*arguments, code=1)


def test_windows_that_another_run_cut_anew_are_refused(corpus, model, tmp_path):
    arguments = ["windows", corpus, "-o", tmp_path / "a", "--model", model, "--window", 512, "-q"]
    longsift(*arguments)
    longsift("score", tmp_path / "a", "-o", tmp_path / "b", *LONGATTN, "-q")
    longsift(*arguments, "--overwrite")
    assert "were cut anew" in longsift("select", tmp_path / "b", code=1)
    longsift("score", tmp_path / "a", "-o", tmp_path / "b", *LONGATTN, "--overwrite", "-q")
    longsift("select", tmp_path / "b")


def test_a_folder_that_cannot_be_written_is_one_line(corpus, model, tmp_path):
    (tmp_path / "file").write_text("")
    output = longsift("windows", corpus, "-o", tmp_path / "file", "--model", model, "-q", code=1)
    assert output.startswith("error: ")
    assert "Traceback" not in output


def test_selecting_in_a_folder_that_does_not_exist_makes_none(tmp_path):
    longsift("select", tmp_path / "none", code=1)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_of_a_run_folder_reads_its_windows(finished):
    plan = as_json(longsift("score", finished, *LONGATTN, "--dry-run", "--json"))
    assert plan["windows"] == len(table(finished / "windows"))
    assert plan["seconds_scoring"] > 0
