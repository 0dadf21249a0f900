"""Runs that are killed, stopped, poisoned or doubled: nothing is lost, and the tables are those of a quiet run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.test_children import gone
from engines.test_local import start_two
from forked_commands import Commands
from longsift.cli import app
from longsift.shards import RunFolder
from longsift.status import run_status
from longsift.tables import parquet_files

FLAGS = ["--method", "longattn", "--window", "512", "--shard-tokens", "512", "--device", "cpu", "--keep", "0.5", "-q"]
TABLES = ("windows", "scores", "selected")


def longsift(*arguments: object, code: int = 0) -> str:
    """Run a command in this process; returns what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def contents(out: Path) -> dict[str, bytes]:
    return {f"{name}/{path.name}": path.read_bytes() for name in TABLES for path in parquet_files(out / name)}


def counts(out: Path) -> dict:
    """The manifest without times."""
    manifest = RunFolder(out).manifest()
    timeless = {"windows": ("identity", "counts"), "scores": ("identity", "calculator", "reasons"), "selected": ()}
    return {stage: {key: manifest[stage][key] for key in keys} for stage, keys in timeless.items()}


def wait_for_scores(out: Path, process: int, number: int = 1) -> None:
    """Wait until a run has published some scores."""
    until = time.monotonic() + 60
    while len(list((out / "scores").glob("*.parquet"))) < number and time.monotonic() < until:
        os.kill(process, 0)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def quiet(corpus, model, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("quiet")
    longsift("run", corpus, "-o", out, "--model", model, *FLAGS)
    assert len(parquet_files(out / "scores")) >= 40
    return out


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("log") / "log") as commands:
        yield commands


def same(out: Path, quiet: Path) -> bool:
    return contents(out) == contents(quiet) and counts(out) == counts(quiet) and not list(out.rglob(".*.tmp"))


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bytes(
    commands, quiet, corpus, model, tmp_path, kills
):
    moments = random.Random(kills)
    left = kills
    while left:  # a run that ends before all kills are used up is followed by another
        out = tmp_path / str(left)
        arguments = ["run", corpus, "-o", out, "--model", model, *FLAGS]
        code = -1
        while code != 0:
            process = commands.start(*arguments)
            if left:
                time.sleep(moments.uniform(0, 0.6))
                os.kill(process, signal.SIGKILL)
            code = commands.wait(process)
            assert code in (0, -signal.SIGKILL), commands.log.read_text()
            left -= code < 0
        assert same(out, quiet)


def unscored(quiet: Path, out: Path) -> Path:
    """A copy of a run whose scores stage has not ended."""
    shutil.copytree(quiet, out, ignore=shutil.ignore_patterns("selected", "report.html"))
    manifest = RunFolder(out).manifest()
    manifest["scores"]["status"] = "running"
    del manifest["selected"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


SCORE = ["--method", "longattn", "--device", "cpu", "-q"]


@pytest.mark.parametrize("workers", [1, 2], ids=["in one process", "two processes"])
def test_a_damaged_shard_is_set_aside_and_the_same_command_tries_it_again(quiet, tmp_path, workers):
    out = unscored(quiet, tmp_path / "out")
    victims = [path.stem for path in parquet_files(out / "windows")][3:6]
    for name in victims:  # these are to be scored; the second of them is damaged
        (out / "scores" / f"{name}.parquet").unlink()
    damaged = out / "windows" / f"{victims[1]}.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])

    score = ["score", out, *SCORE, "--workers", workers]
    output = longsift(*score, code=1)
    assert f"1 shards of scores in {out} are set aside, each tried twice: {victims[1]} (" in output
    scored = {path.stem for path in parquet_files(out / "scores")}
    assert scored == {path.stem for path in parquet_files(quiet / "scores")} - {victims[1]}

    state = run_status(out)["scores"]
    assert (state["state"], state["shards set aside"], state["shards done"]) == ("incomplete", 1, len(scored))
    assert state["set aside"][0]["shard"] == victims[1]
    assert state["set aside"][0]["reason"]
    assert victims[1] in longsift("status", out)

    assert f"select {out} --without-set-aside" in longsift("select", out, code=1)
    assert not (out / "selected").exists()
    select = ["select", out, "--keep", "0.5", "--without-set-aside", "--json"]
    output = longsift(*select)
    assert "1 windows of 1 shards that are set aside are left out" in output
    result = json.loads(output[output.index("{") :])
    assert (result["of"], result["set_aside"]) == (len(scored), 1)
    card = (out / "selected" / "README.md").read_text("utf-8")
    assert "1 further windows, of 1 shards that could not be scored, were never ranked and are left out." in card

    damaged.write_bytes(whole)
    before = {path: path.stat().st_mtime_ns for path in parquet_files(out / "scores")}
    longsift(*score)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run_status(out)["scores"]["state"] == "done"
    assert "left out" not in longsift("select", out, "--keep", "0.5")
    assert "could not be scored" not in (out / "selected" / "README.md").read_text("utf-8")
    assert same(out, quiet)


def test_a_run_in_which_nothing_can_be_scored_ends_before_all_shards_are_set_aside(quiet, tmp_path):
    out = unscored(quiet, tmp_path / "out")
    for path in parquet_files(out / "scores"):
        path.unlink()
        (out / "windows" / path.name).write_bytes(b"no table")
    output = longsift("score", out, *SCORE, code=1)
    assert "16 shards in a row could not be scored, so it is not the shards" in output
    state = run_status(out)["scores"]
    assert (state["state"], state["shards set aside"]) == ("stopped", 16)


def test_status_tells_of_a_run_that_goes_on_and_of_one_that_was_killed(commands, quiet, corpus, model, tmp_path):
    out = tmp_path / "out"
    process = commands.start("run", corpus, "-o", out, "--model", model, *FLAGS)
    wait_for_scores(out, process, 3)
    os.kill(process, signal.SIGSTOP)
    try:
        going_on = run_status(out)["scores"]
        second = CliRunner().invoke(app, ["run", str(corpus), "-o", str(out), "--model", str(model), *FLAGS])
    finally:
        os.kill(process, signal.SIGKILL)
        os.kill(process, signal.SIGCONT)
    assert commands.wait(process) == -signal.SIGKILL
    assert going_on["state"] == "running"
    assert going_on["shards done"] >= 2  # the record of a third may not be there yet
    assert going_on["shards"] == len(parquet_files(quiet / "scores"))
    assert len(going_on["shards running"]) == 1
    assert going_on["process"].startswith(f"{process} on ")
    assert going_on["tokens per second"] > 0
    assert going_on["seconds left"] > 0
    assert second.exit_code == 1
    assert f"Another longsift (process {process}) is writing in {out}" in second.output

    stopped = run_status(out)
    assert stopped["scores"]["state"] == "stopped"
    assert stopped["scores"]["shards running"] == []
    assert stopped["windows"]["bad_rows"] == 0


def test_a_second_run_in_the_folder_leaves_the_first_unharmed(commands, quiet, corpus, model, tmp_path):
    out = tmp_path / "out"
    arguments = ["run", corpus, "-o", out, "--model", model, *FLAGS]
    first = commands.start(*arguments)
    wait_for_scores(out, first)
    codes = [commands.wait(commands.start(*arguments)) for _ in range(2)]
    assert commands.wait(first) == 0
    assert codes[0] == 1
    assert same(out, quiet)


@pytest.mark.parametrize("moment", ["windows", "scores"])
def test_sigterm_ends_a_run_that_can_go_on(commands, quiet, corpus, model, tmp_path, moment):
    out = tmp_path / "out"
    arguments = ["run", corpus, "-o", out, "--model", model, *FLAGS]
    process = commands.start(*arguments)
    while not any((out / moment).glob("*.parquet")):
        time.sleep(0.005)
    os.kill(process, signal.SIGTERM)
    assert commands.wait(process) == 143
    assert "run the same command again" in commands.log.read_text()
    assert not list(out.rglob(".*.tmp"))
    assert commands.wait(commands.start(*arguments)) == 0
    assert same(out, quiet)


def test_sigterm_to_all_processes_of_a_run_ends_them_within_seconds(corpus, model, tmp_path):
    process, children = start_two(corpus, model, tmp_path)
    began = time.monotonic()
    for pid in (*children, process.pid):  # as Slurm does
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors.decode()
    assert time.monotonic() - began < 30
    assert len(children) == 2
    assert all(map(gone, children))
    assert b"which is tried once more" not in errors
    assert run_status(tmp_path)["scores"]["state"] == "stopped"
