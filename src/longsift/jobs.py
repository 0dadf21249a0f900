"""Jobs of a cluster that work in a run folder: what they have now, and whether any may still write.

A task of such a job renews a small file in OUT/jobs/now while it works, since a cluster's nodes share no lock that
tells of each other, and not every machine that sees the folder can ask the cluster.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longsift.errors import OutputError
from longsift.tables import publish

_RENEWED = 5.0  # seconds
_STALE = 60.0  # seconds after which a task that has not renewed its file has ended; clocks differ a little


@contextmanager
def at_work(out: Path, task: str, shards: Callable[[], list[str]]) -> Iterator[None]:
    """Say while the block runs that a task works in the run folder `out`, and which shards it has.

    Args:
        task: a name that no other task has at the time.
        shards: called in a thread of its own.
    """
    path = out / "jobs" / "now" / f"{task}.json"
    ended = threading.Event()

    def renew() -> None:
        while True:
            content = {"task": task, "process": f"{os.getpid()} on {platform.node()}", "shards": shards()}
            # A full disk is the next table's to tell.
            with suppress(OSError, OutputError):
                _write(path, content)
            if ended.wait(_RENEWED):
                return

    thread = threading.Thread(target=renew, name="longsift-at-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


def tasks_at_work(out: Path) -> list[dict[str, Any]]:
    """What the tasks that work in a run folder now say of themselves: `task`, `process` and `shards`."""
    found = []
    for path in sorted((out / "jobs" / "now").glob("*.json")):
        with suppress(FileNotFoundError):  # it has ended meanwhile
            if time.time() - path.stat().st_mtime < _STALE:
                found.append(json.loads(path.read_text("utf-8")))
    return found


def failed_tasks(out: Path) -> list[dict[str, str]]:
    """Tasks of the jobs that were begun last for a run folder which have failed: `task` and `reason`."""
    logs = {path.parent.parent for path in (out / "jobs").glob("**/notes/*.error.json")}
    begun = [path for path in (out / "jobs").glob("[0-9]*") if path.is_dir()]
    last = max((path.name.partition(".")[0] for path in begun), default="")
    return [
        {"task": f"{folder.name}-{rank}", "reason": reason}
        for folder in sorted(logs)
        if folder.relative_to(out / "jobs").parts[0].partition(".")[0] == last
        for rank, reason in TaskNotes(folder).errors().items()
    ]


class TaskNotes:
    """What tasks tell whoever waits for them, in a folder that all see."""

    def __init__(self, logs: Path | str) -> None:
        self._folder = Path(logs) / "notes"

    def tell(self, rank: int, content: dict[str, Any]) -> None:
        """Of a task that has done all that it had."""
        _write(self._folder / f"{rank}.json", content)
        (self._folder / f"{rank}.error.json").unlink(missing_ok=True)  # it had to begin again

    def tell_error(self, rank: int, error: Exception) -> None:
        """Of a task that has failed."""
        _write(self._folder / f"{rank}.error.json", f"{type(error).__name__}: {error}")

    def told(self) -> list[dict[str, Any]]:
        """What those have told that have done all that they had."""
        paths = [path for path in self._folder.glob("*.json") if not path.name.endswith(".error.json")]
        return [json.loads(path.read_text("utf-8")) for path in sorted(paths)]

    def errors(self) -> dict[int, str]:
        """What tasks have failed with, by their ranks."""
        paths = self._folder.glob("*.error.json")
        return dict(sorted((int(path.name.partition(".")[0]), json.loads(path.read_text("utf-8"))) for path in paths))


@contextmanager
def noted(logs: Path | str, rank: int) -> Iterator[dict[str, Any]]:
    """Note how the block ends, with what it puts into the dict."""
    notes, content = TaskNotes(logs), dict[str, Any]()
    try:
        yield content
    except Exception as error:
        notes.tell_error(rank, error)
        raise
    notes.tell(rank, content)


def slurm_jobs(out: Path) -> list[str]:
    """The numbers of the jobs that a command has submitted to Slurm for a run folder last."""
    try:
        numbers: list[str] = json.loads(_submitted(out).read_text("utf-8"))["jobs"]
    except FileNotFoundError:
        return []
    return numbers


def check_ended(out: Path) -> None:
    """Refuse to begin while jobs that were submitted for a run folder are waiting or running.

    Both would write the same files, and what begins removes the temporary ones of all others. One of the jobs
    themselves may begin: they wait for each other.

    Raises:
        OutputError: they are, or nothing can tell.
    """
    numbers = slurm_jobs(out)
    own = {os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID")}
    if not numbers or own.intersection(numbers):
        return
    named = ", ".join(numbers)
    if shutil.which("squeue") is None:
        if working := tasks_at_work(out):
            raise OutputError(
                f"{len(working)} tasks of the Slurm jobs {named} work in {out}, such as process "
                f"{working[0]['process']}. Wait for them, or end them where Slurm is: scancel {' '.join(numbers)}. "
                f"They are taken for ended {_STALE:.0f} seconds after their last sign."
            )
        return
    asked = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(numbers)}"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise OutputError(
            f"squeue cannot tell whether the jobs {named} for {out} have ended: {answer.stderr.strip()}. "
            f"If you know that they have, remove {_submitted(out)}."
        )
    if answer.stdout.strip():
        raise OutputError(
            f"Jobs of an earlier command for {out} are still in Slurm. Wait for them, or end them: "
            f"scancel {' '.join(numbers)}."
        )


def note_slurm_jobs(out: Path, numbers: list[str]) -> None:
    """Remember the numbers of the jobs that were submitted for a run folder."""
    _write(_submitted(out), {"jobs": numbers})


def _write(path: Path, content: Any) -> None:
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content), "utf-8")


def _submitted(out: Path) -> Path:
    return out / "jobs" / "slurm.json"
