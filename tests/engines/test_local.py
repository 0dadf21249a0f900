"""The local engine: who scores a shard changes nothing, and a process that dies costs one more try."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from engines.test_children import gone
from longsift.cli import app
from longsift.cutting import cut_sources
from longsift.engines import local
from longsift.engines.local import LocalEngine
from longsift.errors import ModelError, ProcessLost
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.scoring_stage import ScoreStage
from longsift.shards import RunFolder
from longsift.sources import find_sources
from longsift.status import run_status
from longsift.tables import parquet_files


class Told:
    """What an engine tells while it runs."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.set_aside: dict[str, str] = {}
        self.amounts = [0, 0, 0]

    def done(self, shard: local.Shard) -> None:
        self.shards.append(shard.name)

    def aside(self, windows: Path, why: str) -> None:
        self.set_aside[windows.stem] = why

    def advance(self, *amounts: int) -> None:
        self.amounts = [a + b for a, b in zip(self.amounts, amounts, strict=True)]


def write_shards(folder: Path, texts: list[str]) -> list[Path]:
    paths = [folder / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


@pytest.fixture
def copying(monkeypatch, tmp_path):
    """Run an engine whose processes copy texts as `child_functions.score` says; gives what it told."""
    monkeypatch.setattr(local, "_TARGET", "engines.child_functions:score")
    (tmp_path / "scores").mkdir()

    def run(texts: list[str], workers: int = 2, model: str = "m") -> Told:
        told = Told()
        engine = LocalEngine(
            tmp_path / "scores",
            ModelOptions(model=model),
            ScoreOptions(),
            ["cpu"] * workers,
            on_ready=lambda: None,
            on_done=told.done,
            on_set_aside=told.aside,
            on_advance=told.advance,
        )
        with engine:
            for path in write_shards(tmp_path, texts):
                engine.submit(path)
            engine.finish()
        return told

    return run


def tries(folder: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.glob("*.tries"), key=lambda path: int(path.stem))]


def test_every_shard_is_scored_once_and_told_of(copying, tmp_path):
    told = copying(["a", "bb", "slow", "c", "slow", "d", "e"])
    assert sorted(told.shards) == list("0123456")
    assert told.amounts == [1 + 2 + 4 + 1 + 4 + 1 + 1, 7, 0]
    assert tries(tmp_path) == [1] * 7


def test_a_shard_whose_process_dies_is_tried_once_more(copying, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        told = copying(["a", "kill once", "b", "slow", "c"])
    assert sorted(told.shards) == list("01234")
    assert told.amounts == [1 + 9 + 1 + 4 + 1, 5, 0]  # nothing is counted twice
    assert tries(tmp_path)[1] == 2
    assert "killed by SIGKILL" in caplog.text


@pytest.mark.parametrize(
    ("text", "why"),
    [("kill", "killed by SIGKILL"), ("fault", "illegal memory access was encountered, while measuring window 'd3:0'")],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_ends_two_processes_is_set_aside_and_the_others_are_scored(copying, tmp_path, text, why, workers):
    told = copying(["a", "b", "c", text, "d", "e"], workers)
    assert list(told.set_aside) == ["3"]
    assert why in told.set_aside["3"]
    assert tries(tmp_path)[3] == 2
    assert sorted(told.shards) == list("01245")
    assert told.amounts == [5, 5, 0]  # nothing of what was lost is counted


def test_scores_that_cannot_be_written_stop_the_run_at_once(copying, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        copying(["a", "disk full", "slow", "slow", "slow", "slow"])
    assert tries(tmp_path)[1] == 1


def test_an_error_of_longsift_stops_the_run_at_once(copying, tmp_path):
    with pytest.raises(ModelError, match="no such layer"):
        copying(["a", "refuse", "slow", "slow", "slow", "slow"])
    assert tries(tmp_path)[1] == 1


def test_a_process_that_dies_while_it_starts_is_not_started_for_ever(copying):
    with pytest.raises(ProcessLost, match="before it could score anything"):
        copying(["a"], model="dies")


def test_a_process_that_can_no_longer_begin_leaves_its_shards_to_the_others(copying, caplog):
    with caplog.at_level(logging.WARNING):
        told = copying(["kill once", "a", "b", "wait"], model="begins twice")
    assert sorted(told.shards) == list("0123")
    assert "one fewer from now on" in caplog.text


def test_the_processes_are_gone_when_the_engine_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_TARGET", "engines.child_functions:name_self")
    engine = LocalEngine(
        tmp_path,
        ModelOptions(),
        ScoreOptions(),
        ["cpu"] * 3,
        on_ready=lambda: None,
        on_done=print,
        on_set_aside=print,
        on_advance=print,
    )
    with engine:
        while len(engine._processes) < 3:
            time.sleep(0.01)
        pids = [process.child.pid for process in engine._processes]
    assert all(map(gone, pids))
    assert "longsift-engine" not in [thread.name for thread in threading.enumerate()]


FLAGS = ["--method", "longattn", "--window", "512", "--shard-tokens", "1024", "--device", "cpu", "-q"]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "longsift.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def start_two(corpus: Path, model: Path, out: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a run with two processes; returns it and them when the first scores are there."""
    process = start("run", corpus, "-o", out, "--model", model, *FLAGS, "--workers", 2)
    while process.poll() is None and not any((out / "scores").glob("*.parquet")):
        time.sleep(0.005)
    pids = Path(f"/proc/{process.pid}/task").glob("*/children")
    return process, [int(child) for threads in pids for child in threads.read_text().split()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in parquet_files(folder)}


@pytest.fixture(scope="module")
def alone(corpus, model, tmp_path_factory) -> Path:
    """A run whose windows were scored in this process."""
    out = tmp_path_factory.mktemp("alone")
    assert CliRunner().invoke(app, ["run", str(corpus), "-o", str(out), "--model", str(model), *FLAGS]).exit_code == 0
    return out


def test_two_processes_of_which_one_is_killed_write_the_same_bytes_as_one(alone, corpus, model, tmp_path):
    process, pids = start_two(corpus, model, tmp_path)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    for name in ("windows", "scores", "selected"):
        assert contents(tmp_path / name) == contents(alone / name)
    assert len(contents(tmp_path / "scores")) > 8


def test_windows_are_scored_while_others_are_still_cut(alone, corpus, model, tmp_path):
    folder, sources = RunFolder(tmp_path), find_sources([str(corpus)])
    states = []

    def wait_for_scores(path: Path) -> None:
        stage.offer(path)
        if not states:
            until = time.monotonic() + 60
            while not (folder.scores / path.name).exists() and time.monotonic() < until:
                stage.check()
                time.sleep(0.01)
            states.append(run_status(tmp_path))

    options = ModelOptions(model=str(model)), WindowOptions(window=512, shard_tokens=1024)
    scoring = ScoreOptions(method="longattn", device="cpu")
    with folder.lock(), ScoreStage(folder, options[0], scoring, overwrite=False, quiet=True) as stage:
        cut_sources(sources, folder, *options, overwrite=False, quiet=True, on_part=wait_for_scores)
        result = stage.finish()
    assert [states[0][name]["state"] for name in ("windows", "scores")] == ["running", "running"]
    assert contents(tmp_path / "scores") == contents(alone / "scores")
    assert result["windows"] == sum(len(pq.read_table(path)) for path in parquet_files(tmp_path / "scores"))


def test_ctrl_c_ends_all_processes_and_another_number_of_them_goes_on(alone, corpus, model, tmp_path):
    process, pids = start_two(corpus, model, tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (130, 0)
    assert all(map(gone, pids))
    run = CliRunner().invoke(app, ["run", str(corpus), "-o", str(tmp_path), "--model", str(model), *FLAGS])
    assert run.exit_code == 0
    assert contents(tmp_path / "scores") == contents(alone / "scores")
