"""What the processes of the tests do; they import this by name."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import time
from pathlib import Path

from longsift.engines.children import Link
from longsift.engines.local import Facts, Shard
from longsift.engines.pieces import cut_in_process
from longsift.errors import ModelError
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.pieces import Cutter
from longsift.windows import cut_windows


def double(link: Link, offset: int) -> None:
    """Send twice every number that comes, and the offset."""
    for number in iter(link.receive, None):
        link.send(2 * number + offset)


def many(link: Link, size: int) -> None:
    """Answer every message with `size` bytes."""
    while True:
        link.send(bytes(size) + link.receive()[:0])


def fail(link: Link) -> None:
    """Raise an error with a note."""
    error = ModelError("there is no such model")
    error.add_note("while loading")
    raise error


class Unpicklable(Exception):
    """An error that cannot be made again from what it holds."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_strangely(link: Link) -> None:
    """Raise an error that cannot be sent."""
    raise Unpicklable(1, 2)


def name_self(link: Link) -> None:
    """Send the number of this process, and wait for ever."""
    link.send(os.getpid())
    time.sleep(1000)


def score(
    link: Link, scores: Path, model: ModelOptions, options: ScoreOptions, device: str, threads: int | None
) -> None:
    """Copy shards as the engine's processes score them; what a shard says decides what becomes of the process."""
    if model.model == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if model.model == "begins twice":
        with (scores / "begun").open("a") as file:
            file.write("x")
        if (scores / "begun").stat().st_size > 2:
            os.kill(os.getpid(), signal.SIGKILL)
    link.send(Facts({"device": device}, None))
    for path in iter(link.receive, None):
        text = path.read_text()
        tries = path.with_suffix(".tries")
        with tries.open("a") as file:
            file.write("x")
        link.send((len(text), 1, 0))
        if text == "kill" or (text == "kill once" and tries.read_text() == "x"):
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "fault":
            error = RuntimeError("CUDA error: an illegal memory access was encountered")
            error.add_note("while measuring window 'd3:0'")
            raise error
        if text == "refuse":
            raise ModelError("no such layer")
        if text == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if text == "wait":  # until a third process has begun
            while (scores / "begun").stat().st_size < 3:
                time.sleep(0.01)
            time.sleep(1.0)
        if text == "slow":
            time.sleep(0.3)
        (scores / path.name).write_text(f"{text} {device}")
        link.send(Shard(path.stem, {"windows": 1, "failed": 0, "tokens": len(text), "reasons": {}}, len(text)))
    sys.exit(0)


def cut(link: Link) -> None:
    """Cut documents as the processes that cut do; what a text begins with decides what becomes of the process."""
    tokenizer, length = pickle.loads(link.receive())
    while True:
        rows = link.receive()
        for row in rows:
            if row.text.startswith("kill"):
                tries = Path(row.file)
                with tries.open("a") as file:
                    file.write("x")
                if not row.text.startswith("kill once") or tries.read_text() == "x":
                    os.kill(os.getpid(), signal.SIGKILL)
        link.send(list(cut_windows(rows, tokenizer, length)))


def cut_pieces(link: Link, out: Path, model: ModelOptions, options: WindowOptions) -> None:
    """Cut pieces, but die once after the second file of a piece that `out/../mortal` names; twice if it says so."""
    name, times = (out.parent / "mortal").read_text().split()
    keep = Cutter.keep

    def keep_mortally(cutter, rows, job, folder, progress, on_part):
        tries = out.parent / "tries"
        written = 0

        def count(path: Path) -> None:
            nonlocal written
            on_part(path)
            written += 1
            if job.shard == name and written == 2 and len(tries.read_text() if tries.exists() else "") < int(times):
                with tries.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)

        return keep(cutter, rows, job, folder, progress, count)

    Cutter.keep = keep_mortally
    cut_in_process(link, out, model, options)
