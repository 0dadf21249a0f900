"""Processes that work for another: what they send, how they fail, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longsift.engines.children import Child, Failure
from longsift.errors import ModelError

FUNCTIONS = "engines.child_functions"


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds; one that waits to be reaped has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_child_answers_what_it_is_sent():
    child = Child(f"{FUNCTIONS}:double", 1)
    try:
        for number in (1, 20):
            child.connection.send(number)
        assert [child.receive(), child.receive()] == [3, 41]
        child.connection.send(None)
        with pytest.raises(EOFError):
            child.receive()
        assert child.how_it_ended() == "exit code 0"
    finally:
        child.stop()


def test_neither_side_waits_for_the_other_to_read():
    child = Child(f"{FUNCTIONS}:many", 1 << 20)
    try:
        for _ in range(4):  # far more than a pipe holds, both ways
            child.connection.send(bytes(1 << 20))
        assert [len(child.receive()) for _ in range(4)] == [1 << 20] * 4
    finally:
        child.stop()


def test_an_error_comes_back_with_its_notes():
    child = Child(f"{FUNCTIONS}:fail")
    failure = child.receive()
    child.stop()
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, ModelError)
    assert str(failure.error) == "there is no such model"
    assert failure.error.__notes__ == ["while loading"]


def test_an_error_that_cannot_be_sent_comes_back_in_words_with_its_place():
    child = Child(f"{FUNCTIONS}:fail_strangely")
    failure = child.receive()
    child.stop()
    assert str(failure.error) == "Unpicklable: 1 and 2"
    assert "in fail_strangely" in failure.error.__notes__[0]


def test_a_child_that_is_killed_says_how_it_ended():
    child = Child(f"{FUNCTIONS}:name_self")
    pid = child.receive()
    assert pid == child.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        child.receive()
    assert child.how_it_ended() == "killed by SIGKILL"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "kill"])
def test_no_child_outlives_its_parent(how):
    program = (
        "import time; from longsift.engines.children import Child\n"
        f"children = [Child('{FUNCTIONS}:name_self') for _ in range(2)]\n"
        "print(*[child.receive() for child in children], flush=True)\n"
        "time.sleep(1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(how)
        parent.wait()
        assert len(pids) == 2
        assert all(map(gone, pids))


def test_a_child_that_is_stopped_at_once_says_nothing(capfd):
    for seconds in (0.0, 0.05, 0.2):
        child = Child(f"{FUNCTIONS}:name_self")
        time.sleep(seconds)
        child.stop()
        assert gone(child.pid)
    assert capfd.readouterr().err == ""
