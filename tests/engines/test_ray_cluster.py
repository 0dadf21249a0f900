"""The Ray engine, on a real cluster of two local nodes: the bytes of a local run, whatever dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.test_children import gone
from longsift.jobs import tasks_at_work
from longsift.shards import RunFolder
from longsift.tables import parquet_files

pytest.importorskip("datatrove", reason="needs longsift[datatrove]")
pytest.importorskip("ray", reason="needs longsift[ray]")

pytestmark = [
    pytest.mark.slow,
]

MEASURE = ["--method", "ladm", "--span", "16", "--d-afs", "1", "--d-cds", "1"]
SMALL = ["--window", "512", "--shard-tokens", "512", "--piece-bytes", "10000"]
TASK = ["--engine", "ray", "--gpus-per-task", "0", "--cpus-per-task", "1", "--mem-per-cpu", "1"]


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two nodes, both on this machine, with a CPU each, and a GPU that one claims and does not have."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=1)
    yield cluster.address
    cluster.shutdown()


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longsift", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def longsift(*arguments: object, code: int = 0) -> tuple[str, str]:
    process = start(*arguments)
    out, errors = process.communicate()
    assert process.returncode == code, errors
    return out, errors


def contents(out: Path) -> dict[str, bytes]:
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("windows", "scores", "selected")
        for path in parquet_files(out / name)
    }


def wait_for_tasks(process: subprocess.Popen[str], out: Path, count: int = 2, what: str = "") -> list[int]:
    """The processes of `count` tasks that score, or do something else, as soon as so many are at work."""
    until = time.monotonic() + 120
    while True:
        tasks = [task for task in tasks_at_work(out) if re.search(rf"\.{what}-?\d-\d$", task["task"])]
        if len(tasks) >= count:
            return [int(task["process"].split()[0]) for task in tasks]
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


def parent(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


@pytest.fixture(scope="module")
def arguments(corpus, model):
    return ["run", corpus, "--model", model, "--keep", "0.5", *SMALL, *MEASURE]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> Path:
    """A run of the local engine."""
    out = tmp_path_factory.mktemp("alone")
    longsift(*arguments, "-o", out, "--device", "cpu")
    assert len(parquet_files(out / "scores")) >= 40
    return out


def test_a_run_on_two_nodes_writes_the_bytes_of_a_local_one(address, arguments, alone, tmp_path):
    out, errors = longsift(*arguments, "-o", tmp_path, *TASK, "--address", address, "--tasks", 2, "--json")
    assert contents(tmp_path) == contents(alone)
    assert json.loads(out)["selected"] == json.loads(json.dumps(RunFolder(alone).section("selected")["result"]))
    assert RunFolder(tmp_path).section("scores")["identity"] == RunFolder(alone).section("scores")["identity"]
    assert RunFolder(tmp_path).section("scores")["calculator"] == RunFolder(alone).section("scores")["calculator"]
    assert "scores on a Ray cluster: " in errors
    assert len(RunFolder(tmp_path).records("windows")) > 5
    did = {path.suffix.partition("-")[0] for path in (tmp_path / "jobs").iterdir()}
    assert did == {"", ".lines", ".windows", ".1"}  # of tasks that count, cut and score; and the signs of life
    assert (tmp_path / "report.html").is_file()
    assert not tasks_at_work(tmp_path)


def test_tasks_that_are_killed_or_whose_actors_are_are_begun_again(address, arguments, alone, tmp_path):
    process = start(*arguments, "-o", tmp_path, *TASK, "--address", address, "--tasks", 2)
    [cutting] = wait_for_tasks(process, tmp_path, 1, "windows")[:1]
    os.kill(cutting, signal.SIGKILL)
    scoring = wait_for_tasks(process, tmp_path)
    os.kill(scoring[0], signal.SIGKILL)
    os.kill(parent(scoring[1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(tmp_path) == contents(alone)
    assert all(map(gone, [cutting, *scoring]))


def test_tasks_end_with_the_process_that_asked_for_them_and_the_same_command_goes_on(
    address, arguments, alone, tmp_path
):
    command = [*arguments, "-o", tmp_path, *TASK, "--address", address, "--tasks", 2]
    for end, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(*command)
        tasks = wait_for_tasks(process, tmp_path)
        os.kill(process.pid, end)
        _, errors = process.communicate()
        assert process.returncode == code, errors
        assert all(gone(task, 30) for task in tasks)
        shutil.rmtree(tmp_path / "jobs" / "now")  # a killed task leaves its sign of life, which the next waits to see
    longsift(*command)
    assert contents(tmp_path) == contents(alone)


def test_what_cannot_be_scored_is_told_and_what_can_is_scored(address, corpus, ladm, tmp_path):
    longsift("windows", corpus, "-o", tmp_path, "--model", ladm["model"], *SMALL)
    folder = RunFolder(tmp_path)
    damaged, *whole = parquet_files(folder.windows)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    score = ["score", tmp_path, *MEASURE, *TASK, "--address", address, "--tasks", 1]

    _, errors = longsift(*score, "--gpus-per-task", 1, code=1)  # on the node whose GPU is none
    assert "There is no cuda here (0 GPUs seen)" in errors
    assert folder.manifest()["scores"]["identity"]["device"] == "cuda"
    assert not parquet_files(folder.scores)

    _, errors = longsift(*score, "--overwrite", code=1)
    assert f"1 shards of scores in {tmp_path} are set aside, each tried twice: {damaged.stem} (" in errors
    assert [path.name for path in parquet_files(folder.scores)] == [path.name for path in whole]
    assert folder.manifest()["scores"]["status"] == "incomplete"


def test_that_there_is_no_cluster_is_said_before_windows_are_cut(corpus, tmp_path):
    _, errors = longsift("run", corpus, "-o", tmp_path / "o", *TASK, "--address", "127.0.0.1:9", code=2)
    assert "There is no Ray cluster at 127.0.0.1:9" in errors
    assert "ray start --head" in errors
    assert not (tmp_path / "o").exists()
