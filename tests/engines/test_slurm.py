"""Slurm: a job array of datatrove's executor, on a real cluster of two local nodes (`make test-slurm`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import slurm_cluster
from longsift.shards import RunFolder
from longsift.status import run_status
from longsift.tables import parquet_files
from slurm_cluster import slurm, wait_for_jobs

pytest.importorskip("datatrove", reason="needs longsift[datatrove]")

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from longsift.engines.datatrove import AttentionScores

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason="needs Debian's slurm-wlm and munge"),
]


@pytest.fixture(scope="module")
def cluster():
    """The folder of a running cluster."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder, slurm(Path(folder)):
        yield Path(folder)


def test_a_job_array_gives_the_bits_of_a_run(cluster, corpus, ladm, table, documents, tmp_path):
    SlurmPipelineExecutor(
        [JsonlReader(str(corpus)), AttentionScores(**ladm, per="window"), JsonlWriter(str(tmp_path / "out"))],
        tasks=2,
        time="00:10:00",
        partition="main",
        mem_per_cpu_gb=4,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        logging_dir=str(tmp_path / "logs"),
        slurm_logs_folder=str(tmp_path / "slurm"),
    ).run()
    wait_for_jobs(cluster)
    logs = "\n".join(path.read_text("utf-8") for path in (tmp_path / "slurm").iterdir())
    assert len(list((tmp_path / "logs" / "completions").iterdir())) == 2, logs
    written = {row.id: row for row in JsonlReader(str(tmp_path / "out")).run()}
    scores, windows = table("scores"), table("windows")
    assert written.pop("mixed-5").metadata["longsift"]["status"] == "too short"
    assert written.keys() == scores.keys()
    for name, window in written.items():
        own = window.metadata["longsift"]
        of_the_run = scores[name] | {key: windows[name][key] for key in ("index", "start")}
        assert own == {key: of_the_run[key] for key in own}
        assert window.text == windows[name]["text"]
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text("utf-8"))  # of the dependent job
    counted = next(step["stats"] for step in stats if step["name"] == repr(AttentionScores()))
    assert counted["documents"]["total"] == len(documents)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in parquet_files(folder)}


def longsift(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "longsift", *map(str, arguments)], capture_output=True, text=True)


def test_a_run_through_slurm_writes_the_bytes_of_a_local_one(cluster, corpus, model, run, tmp_path):
    out = tmp_path / "out"
    measure = ["--method", "ladm", "--span", "16", "--d-afs", "1", "--d-cds", "1"]
    where = ["--engine", "slurm", "--partition", "main", "--gpus-per-task", "0", "--cpus-per-task", "1"]
    pieces = ["--piece-bytes", "10000"]
    command = ["run", corpus, "--model", model, "--window", "512", "--keep", "0.5", *pieces, *measure]
    assert longsift(*command, "-o", tmp_path / "local", "--device", "cpu").returncode == 0
    submitted = longsift(*command, "-o", out, *where, "--tasks", "2", "--json")
    assert submitted.returncode == 0, submitted.stderr
    told = json.loads(submitted.stdout)
    assert told["pieces"] > 4
    assert (told["tasks"], told["shards"], len(told["jobs"])) == (2, None, 5)  # lines, windows, their end, scores, end
    wait_for_jobs(cluster)
    logs = "\n".join(path.read_text("utf-8") for path in Path(told["logs"], "slurm").iterdir())
    folder, local = RunFolder(out), RunFolder(tmp_path / "local")
    assert len(folder.records("windows")) == told["pieces"], logs
    assert folder.section("windows")["counts"] == local.section("windows")["counts"]
    assert folder.section("scores")["counts"]["windows"] == local.section("scores")["counts"]["windows"], logs
    assert folder.section("scores")["identity"] == local.section("scores")["identity"]
    for name in ("windows", "scores", "quarantine", "selected"):
        assert contents(out / name) == contents(tmp_path / "local" / name)
    assert folder.section("selected")["result"]["kept"] > 0
    assert folder.report.is_file()

    later = longsift("score", out, "--model", model, *measure, *where, "--json")
    nothing = {"jobs": [], "tasks": 0, "pieces": 0, "shards": 0, "logs": None}
    assert json.loads(later.stdout) == nothing, later.stderr


def test_a_file_that_cannot_be_read_is_told_of_and_nothing_is_scored_without_it(cluster, corpus, model, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(corpus, inputs)
    where = ["--engine", "slurm", "--partition", "main", "--gpus-per-task", "0", "--cpus-per-task", "1", "--tasks", "1"]
    command = ["score", inputs, "-o", out, "--model", model, "--window", "512", "--method", "longattn"]
    command += ["--piece-bytes", "20000"]
    submitted = longsift(*command, *where, "--sbatch", "begin=now+3", "--json")
    assert submitted.returncode == 0, submitted.stderr
    gone, *others = sorted(inputs.iterdir())
    whole = gone.read_bytes()
    stamp = gone.stat()
    gone.unlink()
    wait_for_jobs(cluster)
    folder = RunFolder(out)
    lost = [shard for shard, piece in folder.pieces().items() if piece.source.url == str(gone)]
    assert len(lost) > 1
    assert folder.pieces().keys() - folder.records("windows").keys() == set(lost)
    state = run_status(out)
    assert state["windows"]["pieces"] - state["windows"]["pieces done"] == len(lost)
    [failed] = state["failed tasks"]
    assert failed["task"] == "windows-end-0"
    assert f"1 of {len(others) + 1} files could not be read; all others were cut" in failed["reason"]
    assert str(gone) in failed["reason"]
    assert not folder.scores.exists()

    gone.write_bytes(whole)
    os.utime(gone, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    here = longsift(*command)
    assert here.returncode == 0, here.stderr
    assert folder.section("scores")["counts"]["windows"] == folder.section("windows")["counts"]["windows"] > 0


def test_nothing_begins_in_a_folder_whose_jobs_are_in_slurm_until_they_are_cancelled(
    cluster, corpus, model, run, tmp_path
):
    out = tmp_path / "out"
    measure = ["--method", "ladm", "--span", "16", "--d-afs", "1", "--d-cds", "1"]
    where = ["--engine", "slurm", "--partition", "main", "--gpus-per-task", "0", "--cpus-per-task", "1"]
    command = ["run", corpus, "-o", out, "--model", model, "--window", "512", *measure]
    submitted = longsift(*command, *where, "--sbatch", "begin=now+1hour", "--json")
    assert submitted.returncode == 0, submitted.stderr
    jobs = json.loads(submitted.stdout)["jobs"]
    for again in ([*command, *where], command, ["windows", *command[1:8], "--overwrite"]):
        refused = longsift(*again)
        assert refused.returncode == 1, again
        assert f"for {out} are still in Slurm. Wait for them, or end them: scancel {' '.join(jobs)}" in refused.stderr
    subprocess.run(["scancel", *jobs], check=True)
    wait_for_jobs(cluster)
    assert longsift(*command).returncode == 0
    for path in RunFolder(run).scores.iterdir():
        assert (out / "scores" / path.name).read_bytes() == path.read_bytes()


def test_a_shard_that_cannot_be_read_does_not_stop_the_others(cluster, corpus, ladm, tmp_path):
    out, model = tmp_path / "out", ladm["model"]
    assert longsift("windows", corpus, "-o", out, "--model", model, "--window", "512").returncode == 0
    folder = RunFolder(out)
    damaged, whole = sorted(folder.windows.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-100])
    where = ["--engine", "slurm", "--partition", "main", "--gpus-per-task", "0", "--cpus-per-task", "1", "--tasks", "1"]
    submitted = longsift("score", out, "--method", "longattn", *where, "--json")
    assert submitted.returncode == 0, submitted.stderr
    wait_for_jobs(cluster)
    assert [path.name for path in folder.scores.iterdir()] == [whole.name]
    assert set(folder.shards_set_aside()) == {damaged.stem}
    assert folder.manifest()["scores"]["status"] == "incomplete"


def test_a_machine_without_a_gpu_submits_jobs_that_have_one(cluster, corpus, ladm, tmp_path):
    out = tmp_path / "out"
    assert longsift("windows", corpus, "-o", out, "--model", ladm["model"], "--window", "512").returncode == 0
    where = ["--engine", "slurm", "--partition", "main", "--cpus-per-task", "1"]
    submitted = longsift("score", out, "--method", "longattn", *where, "--json")
    assert submitted.returncode == 0, submitted.stderr
    assert RunFolder(out).manifest()["scores"]["identity"]["device"] == "cuda"
    wait_for_jobs(cluster)
    logs = "\n".join(path.read_text("utf-8") for path in Path(json.loads(submitted.stdout)["logs"], "slurm").iterdir())
    assert "There is no cuda here (0 GPUs seen)" in logs  # Slurm has given out one that is none
