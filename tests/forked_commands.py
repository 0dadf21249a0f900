"""Commands of longsift in processes that begin at once: this one has imported what they need, and forks them.

It reads lines of JSON, `["start", log, argument, …]` and `["wait", process]`, and answers with the number of the
process and with its exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401

import longsift.datasets
import longsift.report
import longsift.scoring
import longsift.selection  # noqa: F401
from longsift.cli import app


def start(log: str, *arguments: str) -> int:
    """Fork a process that runs a command, whose output goes to the file `log`."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        app(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process, or less than 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print({"start": start, "wait": wait}[what](*arguments), flush=True)


class Commands:
    """The other end: starts commands and waits for them; a context manager."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, *arguments: object) -> int:
        """Start a command; returns its process."""
        return self._ask("start", str(self.log), *map(str, arguments))

    def wait(self, process: int) -> int:
        """Wait for the end of a command."""
        return self._ask("wait", process)

    def _ask(self, *line: object) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(line), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())


if __name__ == "__main__":
    main()
