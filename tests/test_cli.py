"""The command line itself: what it says, what it refuses, and how quickly it starts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer.main

from longsift.cli import app
from test_pipeline import as_json, longsift

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands


def test_help_imports_no_torch():
    code = "import sys; from longsift.cli import app; app(['run', '--help'], standalone_mode=False)"
    check = "; assert not {'torch', 'transformers', 'pyarrow', 'duckdb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_has_help(name):
    assert COMMANDS[name].help
    assert all(parameter.help for parameter in COMMANDS[name].params)


def test_the_command_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.render()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "{tmp}/none.jsonl", "-o", "{tmp}/o"], 1, "none.jsonl"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "no-such-model"], 1, "There is no model 'no-such-model'"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--revision", "main"], 1, "'embedded' is on this machine"),
        (
            ["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--method", "loudness"],
            2,
            "longattn, ladm, calibrated",
        ),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--span", "64"], 2, "--span does not apply"),
        (
            ["run", "{corpus}", "-o", "{tmp}/o", "--method", "longattn", "--model", "{model}", "--layers", "2"],
            2,
            "--layers does not apply",
        ),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--layers", "two"], 2, "--layers takes numbers"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--device", "tpu0"], 2, "--device takes"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--dtype", "int8"], 2, "--dtype takes"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--model", "{model}"], 2, "longsift calibrate CORPUS --model {model} -o"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--rope-theta", "9e5"], 2, "another RoPE base"),
        (["run", "{corpus}", "-o", "{tmp}/o", "--calibration", "{tmp}/no.json"], 2, "longsift calibrate"),
        (
            ["score", "{corpus}", "-o", "{tmp}/o", "--model", "{model}", "--window", "512"],
            2,
            "longsift calibrate CORPUS",
        ),
        (
            ["run", "{corpus}", "-o", "{tmp}/o", "--method", "longattn", "--model", "{model}", "--keep", "2"],
            2,
            "--keep is a share",
        ),
        (
            ["run", "{corpus}", "-o", "{tmp}/o", "--method", "longattn", "--model", "{model}", "--mix", "code:1"],
            2,
            "--mix takes shares",
        ),
        (["run", "{corpus}", "-o", "{tmp}/o", "--keep", "0.1", "--budget", "9"], 2, "either --keep SHARE or --budget"),
        (["score", "{corpus}"], 2, "-o OUT"),
        (["select", "{tmp}"], 1, "Run 'longsift score' first"),
        (["report", "{tmp}"], 1, "Run 'longsift select' first"),
        (["status", "{tmp}"], 1, "holds no run"),
    ],
    ids=lambda value: " ".join(value).replace("{", "").replace("}", "") if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line_that_names_the_fix(arguments, code, message, corpus, model, tmp_path):
    places = {"tmp": tmp_path, "corpus": corpus, "model": model}
    given = [argument.format(**places) for argument in arguments]
    flags = ["--window", 1024, "-q"] if given[0] == "run" else []
    output = longsift(*given, *flags, code=code)
    assert message.format(**places) in output
    assert "Traceback" not in output
    assert not (tmp_path / "o").exists() or code == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--window", 0],
        ["--window", 3],
        ["--sample", 0],
        ["--limit", -1],
        ["--seed", 2**70],
        ["--max-bad", -1],
        ["--shard-tokens", 0],
        ["--text-key", ""],
        ["--group-by", ""],
        ["--rope-theta", "nan"],
        ["--rope-theta", 0],
        ["--alpha", 1e308],
        ["--query-fraction", "9/8"],
        ["--budget", 10**30],
        ["--device", "meta"],
        ["--method", "ladm", "--window", 2304],
        ["--method", "ladm", "--layers", "9-2"],
        ["--mix", "code=0.3,code=0.3"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_value_out_of_range_is_a_usage_error_before_any_work(flags, corpus, model, tmp_path):
    method = [] if "--method" in flags else ["--method", "longattn"]
    output = longsift("run", corpus, "-o", tmp_path / "o", "--model", model, *method, *flags, "-q", code=2)
    assert output.startswith("usage: --")
    assert not (tmp_path / "o").exists()


def test_a_run_without_any_window_says_why(corpus, model, tmp_path):
    flags = ["--method", "longattn", "--model", model, "--window", 30_000]
    output = longsift("run", corpus, "-o", tmp_path / "o", *flags, "-q", code=1)
    assert "of 12 documents 12 are too short" in output


def test_wrong_flags_are_found_before_any_work(corpus, model, tmp_path):
    """A run of hours must not end in a refusal that a look at its flags could have given."""
    longsift("run", corpus, "-o", tmp_path / "o", "--method", "longattn", "--model", model, "--keep", 2, "-q", code=2)
    assert not (tmp_path / "o").exists()


def test_a_config_file_sets_flags_and_flags_win(corpus, model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {model}\nwindow: 256\ngroup-by: source\n")
    counts = [
        as_json(longsift("windows", corpus, "-o", tmp_path / name, "--config", config, *flags, "--json", "-q"))
        for name, flags in (("a", []), ("b", ["--window", 512]))
    ]
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a", "b")]
    assert [manifest["windows"]["identity"]["window"] for manifest in manifests] == [256, 512]
    assert counts[0]["windows"] > counts[1]["windows"]


def test_a_config_file_takes_flags_by_the_names_that_are_shown(corpus, model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("no-text: true\nids: false\nmix: {code: 0.5, mixed: 0.5}\nkeep: 0.5\njson: true\n")
    longsift("run", corpus, "-o", tmp_path / "o", "--method", "longattn", "--model", model, "--window", 512, "-q")
    result = as_json(longsift("select", tmp_path / "o", "--config", config))
    assert result["kept"]
    columns = pq.read_schema(next((tmp_path / "o" / "selected").glob("*.parquet"))).names
    assert not {"text", "input_ids"} & set(columns)


def test_a_config_file_with_an_unknown_flag_is_refused(corpus, tmp_path):
    (tmp_path / "config.yaml").write_text("windw: 256\n")
    output = longsift("windows", corpus, "-o", tmp_path / "o", "--config", tmp_path / "config.yaml", code=2)
    assert "windw" in output


def test_doctor_names_devices_and_versions():
    facts = as_json(longsift("doctor", "--json"))
    assert facts["cores"] >= 1
    assert facts["libraries"]["torch"]
    assert facts["device"]


def test_version():
    assert longsift("--version").startswith("longsift 0")
