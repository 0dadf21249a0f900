"""The Ray engine: tasks on a Ray cluster cut and score the windows of a run folder, through datatrove's executor.

The process that asks for it waits for them, shows their progress and does all the rest of the run itself. Tasks end
with it. They record every shard that is done, so that the same command goes on after anything.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from longsift.engines.children import Child, Failure, Link
from longsift.engines.local import Advance, Facts, Patience, Shard
from longsift.engines.tasks import CountLines, CutPieces, ScoreShards, deal, for_tasks, new_logs
from longsift.errors import LongsiftError, ProcessLost, UsageError
from longsift.jobs import TaskNotes, tasks_at_work
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, WindowOptions
from longsift.pieces import uncounted
from longsift.progress import Progress
from longsift.shards import RunFolder

try:
    import ray
    from datatrove.executor import RayPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise UsageError("--engine ray needs Ray and datatrove: pip install 'longsift[datatrove,ray]'") from error

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds between two looks at what is done
_PATIENCE = 60  # seconds in which a cluster must answer at first
_REMEDY = (
    "Start one with 'ray start --head', or name it: --address HOST:PORT. "
    "One that asks for a token needs RAY_AUTH_MODE=token in the environment."
)
_TRIES = 2  # times that shards are dealt out
_GB = 4  # of memory, a CPU
_LOST = "they were lost; perhaps their memory ran out"


def check(options: ScoreOptions, engine: EngineOptions) -> None:
    """Find what cannot work before windows are cut.

    Raises:
        UsageError: no cluster at the address, or options of the local engine.
    """
    engine.of_tasks(options)
    child = Child(f"{__name__}:look", engine.address)
    try:
        if not child.connection.poll(_PATIENCE):  # Ray tries for longer
            raise UsageError(f"The Ray cluster did not answer in {_PATIENCE} seconds. Is it still there? {_REMEDY}")
        nodes = _answer(child)
    finally:
        child.stop()
    asked = _resources(engine)
    if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        wanted = f"{asked['GPU']} GPU, {asked['CPU']} CPUs and {asked['memory'] >> 30} GB"
        log.warning(
            "no node of the cluster has the %s that a task asks for now (--gpus-per-task, --cpus-per-task, "
            "--mem-per-cpu): the tasks wait until there is one",
            wanted,
        )


def look(link: Link, address: str | None) -> None:
    """What a process does: send the resources of every living node."""
    _connect(address)
    link.send([node["Resources"] for node in ray.nodes() if node["Alive"]])
    ray.shutdown()


class RayEngine:
    """Scores shards on a Ray cluster; has the form of `LocalEngine`, and the same callbacks, called in this thread.

    A task that dies with its node, or whose memory runs out, is begun again by datatrove, up to three times; what is
    left then is dealt out once more, and what is left after that is set aside.

    Args:
        folder: the run folder, whose lock is held.
        model, options: what the scorers are made of; `options.device` is that of the tasks.
        engine: the cluster, and what a task asks of it.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: ModelOptions,
        options: ScoreOptions,
        engine: EngineOptions,
        *,
        on_ready: Callable[[], None],
        on_done: Callable[[Shard], None],
        on_set_aside: Callable[[Path, str], None],
        on_advance: Advance,
    ) -> None:
        self._folder, self._model, self._options, self._engine = folder, model, options, engine
        self._on_ready, self._on_done = on_ready, on_done
        self._on_set_aside, self._on_advance = on_set_aside, on_advance
        self._left: dict[str, Path] = {}  # submitted, and neither done nor set aside
        self._patience = Patience()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no task is left when `finish` ends, however it does."""

    def submit(self, windows: Path) -> None:
        """Have a windows file scored."""
        # What says that it is done must be of now.
        (self._folder.path / "shards" / "scores" / f"{windows.stem}.json").unlink(missing_ok=True)
        self._left[windows.stem] = windows

    def check(self) -> None:
        """Raise nothing: tasks begin when all is submitted."""

    def finish(self) -> Facts:
        """Wait until all that was submitted is published or set aside.

        Raises:
            UsageError: no cluster at the address.
            ProcessLost: the cluster was lost, or tasks ended for a reason that concerns all shards.
        """
        self._on_ready()
        facts = None
        for number in range(1, _TRIES + 1):
            before = len(self._left)
            told, errors = self._try_all(number)
            facts = told or facts
            if facts is not None and not self._left:
                return facts
            why = next(iter(errors), _LOST)
            if errors and len(self._left) == before:
                facts = None
                break
            log.warning("tasks on the Ray cluster ended with %d shards left (%s)", len(self._left), why)
        if facts is None:
            raise ProcessLost(_undone(why, self._logs))
        for path in list(self._left.values()):
            self._set_aside(path, f"{_TRIES} tasks that had it ended: {why}")
        return facts

    def under_way(self) -> list[str]:
        """The names of the shards that tasks have now."""
        return [shard for task in tasks_at_work(self._folder.path) for shard in task["shards"]]

    def _try_all(self, number: int) -> tuple[Facts | None, list[str]]:
        """Have tasks score what is left; what they tell of the calculator, and their errors."""
        out = self._folder.path.resolve()
        logs = self._logs = new_logs(out).with_suffix(f".{number}")
        shards, tasks = deal([path.name for path in self._left.values()], self._engine, logs)
        step = ScoreShards(out, shards, logs, tied_to_actor, model=self._model, options=self._options)
        _run(step, tasks, self._engine, logs, self._collect)
        notes = TaskNotes(logs)
        facts = next((Facts(**told) for told in notes.told() if told), None)  # the same of all tasks
        return facts, list(notes.errors().values())

    def _collect(self) -> None:
        """Tell of the shards that tasks have recorded or set aside since the last look."""
        aside = self._folder.path / "shards" / "set-aside"
        records = self._folder.path / "shards" / "scores"
        for name in sorted(self._left.keys() & {path.stem for path in records.glob("*.json")}):
            shard = Shard.recorded(records / f"{name}.json")
            del self._left[name]
            self._patience.scored()
            self._on_advance(shard.counts["tokens"], shard.counts["windows"], shard.counts["failed"])
            self._on_done(shard)
        if names := self._left.keys() & {path.stem for path in aside.glob("*.json")}:
            reasons = self._folder.shards_set_aside()
            for name in sorted(names):
                self._set_aside(self._left[name], reasons[name])

    def _set_aside(self, windows: Path, why: str) -> None:
        del self._left[windows.stem]
        self._on_set_aside(windows, why)
        self._patience.set_aside(why)


def cut_on_cluster(
    folder: RunFolder,
    model: ModelOptions,
    options: WindowOptions,
    engine: EngineOptions,
    shards: Sequence[str],
    progress: Progress,
) -> None:
    """Have tasks cut pieces of files, by their shards; those that cannot be read are left.

    Raises:
        UsageError: no cluster at the address.
        ProcessLost: the cluster was lost, or tasks ended without having done what they had.
    """
    pieces, records = folder.pieces(), folder.path / "shards" / "windows"
    engine, options = replace(engine, gpus_per_task=0), for_tasks(options, engine)
    left = set(shards)

    def collect() -> None:
        for shard in sorted(left & {path.stem for path in records.glob("*.json")}):
            left.discard(shard)
            windows = json.loads((records / f"{shard}.json").read_text("utf-8"))["windows"]
            progress.advance(pieces[shard].size, windows=windows)

    _insist("lines", folder, engine, lambda: uncounted(folder), CountLines)
    cut = partial(CutPieces, model=model, options=options)
    _insist("windows", folder, engine, lambda: sorted(left), cut, collect)


def _insist(
    what: str,
    folder: RunFolder,
    engine: EngineOptions,
    names: Callable[[], list[str]],
    step: Callable[..., PipelineStep],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Have tasks do a step on names until each has done its share: twice at most.

    Raises:
        ProcessLost: some have not.
    """
    out, why = folder.path.resolve(), ""
    logs = new_logs(out)
    for number in range(1, _TRIES + 1):
        if not (left := names()):
            return
        logs = logs.with_suffix(f".{what}-{number}")
        listed, tasks = deal(left, engine, logs)
        _run(step(out, listed, logs, tied_to_actor), tasks, engine, logs, look)
        notes = TaskNotes(logs)
        if len(notes.told()) == tasks:
            return
        why = next(iter(notes.errors().values()), _LOST)
        log.warning("tasks on the Ray cluster ended before they had done what they had to (%s)", why)
    raise ProcessLost(_undone(why, logs))


def _undone(why: str, logs: Path) -> str:
    return (
        f"Tasks on the Ray cluster ended before they had done what they had to ({why}). Their logs are in {logs}. Once "
        "that is mended, the same command goes on where it stopped."
    )


def _run(step: PipelineStep, tasks: int, engine: EngineOptions, logs: Path, look: Callable[[], None]) -> None:
    """Have tasks of a step run on the cluster; `look` is called now and then, and when they have ended."""
    child = Child(f"{__name__}:run_tasks", step, tasks, engine, logs)
    try:
        while not wait([child.connection], _POLL):
            look()
        _answer(child)
    finally:
        child.stop()  # and with it, as it is their owner, all that it has begun on the cluster
    look()


def _answer(child: Child) -> Any:
    """What a process sends at its end.

    Raises:
        LongsiftError: it has failed.
    """
    try:
        message = child.receive()
    except EOFError:
        raise ProcessLost(
            f"The process that speaks to the Ray cluster ended ({child.how_it_ended()}). Is the cluster still there? "
            "The same command goes on where it stopped."
        ) from None
    if isinstance(message, Failure):
        if isinstance(message.error, LongsiftError):
            raise message.error
        raise ProcessLost(
            f"The Ray cluster cannot be used: {type(message.error).__name__}: {message.error}. "
            "Once that is mended, the same command goes on where it stopped."
        ) from message.error
    return message


def run_tasks(link: Link, step: PipelineStep, tasks: int, engine: EngineOptions, logs: Path) -> None:
    """What a process does: have the tasks of a step run on the cluster, wait for them, and send None."""
    logger.remove()  # datatrove's, which says everything on stderr
    logger.add(logs / "datatrove.log")
    _connect(engine.address)
    asked = _resources(engine)
    RayPipelineExecutor(
        [step],
        tasks=tasks,
        cpus_per_task=asked["CPU"],
        gpus_per_task=asked["GPU"],
        mem_per_cpu_gb=engine.mem_per_cpu or _GB,
        logging_dir=str(logs / "score"),
    ).run()
    ray.shutdown()
    link.send(None)


def _connect(address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), _PATIENCE).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except OSError as error:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise UsageError(f"There is no Ray cluster {where} ({error}). {_REMEDY}") from error


def _resources(engine: EngineOptions) -> dict[str, int]:
    """What a task reserves, by Ray's names; memory in bytes."""
    memory = engine.cpus * (engine.mem_per_cpu or _GB) << 30
    return {"CPU": engine.cpus, "GPU": engine.gpus, "memory": memory}


@contextmanager
def tied_to_actor() -> Iterator[None]:
    """Have this process and its parent end with each other while the block runs.

    datatrove runs a task in a process beside a Ray actor, and neither notices that the other was killed: the actor
    would wait for ever, and the process go on though Ray has given its GPU away.
    """
    actor = os.getppid()
    code = f"import os, sys; sys.stdin.read() or os.kill({actor}, {signal.SIGKILL:d})"
    watch = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    done = threading.Event()

    def end_with_actor() -> None:
        while not done.wait(1):
            if os.getppid() != actor:
                os._exit(1)

    threading.Thread(target=end_with_actor, name="longsift-tied", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        watch.communicate("done")
