"""What is known of a cluster's jobs on a machine that cannot ask the cluster."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress

import pytest

from longsift.errors import OutputError
from longsift.jobs import TaskNotes, at_work, check_ended, failed_tasks, note_slurm_jobs, noted, tasks_at_work
from longsift.status import run_status


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def wait_for_task(out):
    until = time.monotonic() + 30
    while not tasks_at_work(out):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_nothing_begins_where_a_task_is_at_work(tmp_path):
    note_slurm_jobs(tmp_path, ["17", "18"])
    check_ended(tmp_path)
    with at_work(tmp_path, "one-0", lambda: ["part-3"]):
        wait_for_task(tmp_path)
        assert [task["shards"] for task in tasks_at_work(tmp_path)] == [["part-3"]]
        with pytest.raises(
            OutputError, match=rf"Slurm jobs 17, 18 work in .* process {os.getpid()} on .*scancel 17 18"
        ):
            check_ended(tmp_path)
    assert not tasks_at_work(tmp_path)
    check_ended(tmp_path)


def test_a_task_that_gives_no_sign_any_more_has_ended(tmp_path):
    note_slurm_jobs(tmp_path, ["17"])
    with at_work(tmp_path, "one-0", list):
        wait_for_task(tmp_path)
        (sign,) = (tmp_path / "jobs" / "now").glob("*.json")
        os.utime(sign, (time.time() - 100,) * 2)
        assert not tasks_at_work(tmp_path)
        check_ended(tmp_path)


def test_of_the_tasks_that_failed_those_of_the_last_jobs_are_told(tmp_path):
    for logs in ("jobs/20250101T000000/score", "jobs/20250102T000000.windows-1", "jobs/20250102T000000.windows-2"):
        for rank in (0, 1):
            with suppress(ValueError), noted(tmp_path / logs, rank):
                if rank or logs.endswith("2"):
                    raise ValueError(f"task {rank}")
    with noted(tmp_path / "jobs/20250102T000000.windows-2", 0) as told:  # it begins again
        told["all"] = "well"
    assert failed_tasks(tmp_path) == [
        {"task": "20250102T000000.windows-1-1", "reason": "ValueError: task 1"},
        {"task": "20250102T000000.windows-2-1", "reason": "ValueError: task 1"},
    ]
    assert TaskNotes(tmp_path / "jobs/20250102T000000.windows-2").told() == [{"all": "well"}]


def test_a_job_begins_beside_those_that_it_belongs_to(tmp_path, monkeypatch):
    note_slurm_jobs(tmp_path, ["17", "18"])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "18")
    with at_work(tmp_path, "one-0", list):
        wait_for_task(tmp_path)
        check_ended(tmp_path)


def test_a_folder_in_which_no_job_was_submitted_is_free(tmp_path):
    with at_work(tmp_path, "one-0", list):  # of Ray, whose tasks end with the process that holds the lock
        wait_for_task(tmp_path)
        check_ended(tmp_path)


def test_status_tells_which_shards_the_tasks_have(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    with at_work(out, "one-0", lambda: ["part-3"]), at_work(out, "one-1", lambda: ["part-4", "part-5"]):
        while len(tasks_at_work(out)) < 2:
            time.sleep(0.01)
        assert run_status(out)["scores"]["shards running"] == ["part-3", "part-4", "part-5"]
    assert run_status(out)["scores"]["shards running"] == []
