"""Python processes that do one thing for this one, talk to it over a pipe, and end when it does.

A child is started anew (nothing is forked, and the caller's main module is not run again), so it works from scripts and
notebooks alike, and beside threads and a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from longsift.errors import LongsiftError

_START = (
    # First of all, since Slurm ends a job with SIGTERM to all of its processes: it is the parent's to handle.
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from longsift.engines.children import serve; serve(int(sys.argv[1]))"
)
_GRACE = 5.0  # seconds in which a child that is told to end may do so


class Failure:
    """What a child sends last when its function has raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Child:
    """A process that calls a function with a `Link` to this one.

    Args:
        target: the function, `module:name`.
        arguments: its other arguments; they are pickled.

    Attributes:
        connection: what the function sends is received here, and sent here for it to receive.
    """

    def __init__(self, target: str, *arguments: Any) -> None:
        self.connection, theirs = Pipe()
        try:
            path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is the parent's; a child ends with it
            )
        finally:
            theirs.close()
        self.connection.send((target, arguments))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def receive(self) -> Any:
        """The next thing that the function sends, or the `Failure` that it ended with.

        Raises:
            EOFError: the process has ended.
        """
        try:
            return self.connection.recv()
        except OSError as error:  # reset instead of closed, when it was killed with unread messages
            raise EOFError from error

    def how_it_ended(self) -> str:
        """The exit code or signal in words, of a process that has ended or is about to."""
        code = self._end()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End the process, whatever it does."""
        stop([self])

    def _end(self, seconds: float = _GRACE) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def stop(children: Iterable[Child]) -> None:
    """End processes, whatever they do; all of them have the same few seconds to do so."""
    children = list(children)
    for child in children:
        child.connection.close()  # at which it ends by itself
    until = time.monotonic() + _GRACE
    for child in children:
        child._end(max(0.0, until - time.monotonic()))


class Link:
    """A child's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, message: Any) -> None:
        """Send something to the parent."""
        self._connection.send(message)

    def receive(self) -> Any:
        """Wait for the next thing that the parent sends."""
        return self._received.get()

    def listen(self) -> None:
        """Receive for ever, and end this process when the parent is gone.

        It runs in a thread of its own, so that neither side ever waits for the other to read.
        """
        while True:
            try:
                self._received.put(self._connection.recv())
            except (EOFError, OSError):
                os._exit(1)


def serve(handle: int) -> None:
    """Be a child whose end of the pipe is the file descriptor `handle`."""
    connection = Connection(handle)
    link = Link(connection)
    try:
        target, arguments = connection.recv()
        threading.Thread(target=link.listen, name="longsift-listen", daemon=True).start()
        module, _, name = target.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name)
        function(link, *arguments)
    except BaseException as error:
        with suppress(OSError):  # the parent is gone
            link.send(Failure(_portable(error)))
    sys.stderr.flush()
    os._exit(0)  # threads of libraries have nothing left to do


def _portable(error: BaseException) -> BaseException:
    """The error, with where it happened in a note, in a form that can be sent."""
    if not isinstance(error, LongsiftError):
        error.add_note("In another process:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some errors cannot be pickled, and some not made again
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.__notes__ = list(getattr(error, "__notes__", ()))
        return other
    return error
