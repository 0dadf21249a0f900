"""The local engine: shards are scored by processes of this machine, one a device, or by this one on a CPU.

The parent hands out shards, keeps the records and shows the progress; a process has a Scorer of its own and publishes
the scores of its shards. Which process takes which shard changes no bit of a score. A shard that raises, or whose
process ends, is tried once more, alone, and then set aside; the others go on.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.engines.children import Child, Failure, Link, stop
from longsift.errors import LongsiftError, ProcessLost
from longsift.options import ModelOptions, ScoreOptions
from longsift.tables import publish

if TYPE_CHECKING:
    from longsift.scoring import Scorer

log = logging.getLogger(__name__)

_AHEAD = 2  # shards that a process has at a time: it reads the next while it measures one
_POLL = 0.05  # seconds within which new shards are handed out
_SAY_EVERY = 0.2  # seconds between two messages of a process on how far it is
_HOPELESS = 16  # shards set aside with none scored between: then it is not the shards
_COUNTS = ("windows", "failed", "tokens", "reasons")
_TARGET = f"{__name__}:score_in_process"

Advance = Callable[[int, int, int], None]


class ShardRaised(Exception):
    """A shard could not be read or measured, which says nothing of others; the text is why."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard whose scores are published.

    Attributes:
        name: of its files, without the suffix.
        counts: windows, failed, tokens, and reasons of failures by how often.
        longest: tokens of its longest window.
    """

    name: str
    counts: dict[str, Any]
    longest: int

    def record(self, seconds: float, devices: int | None) -> dict[str, Any]:
        """What is recorded of it, which took so many seconds of so many devices, where their number is known."""
        taken = {"seconds": round(seconds, 3)} | ({} if devices is None else {"devices": devices})
        return {**self.counts, "longest": self.longest, **taken}

    @classmethod
    def recorded(cls, path: Path) -> Shard:
        """The shard that a file records."""
        record = json.loads(path.read_text("utf-8"))
        return cls(path.stem, {name: record[name] for name in _COUNTS}, record["longest"])


@dataclass(frozen=True, slots=True)
class Facts:
    """A calculator as a process has loaded it: for the manifest, and the longest window that it states."""

    calculator: dict[str, Any]
    max_length: int | None


def facts_of(scorer: Scorer) -> Facts:
    """What is told of the calculator of a scorer."""
    return Facts(scorer.describe(), scorer.calculator.max_length)


def score_files(scorer: Scorer, windows: Iterable[Path], scores: Path, advance: Advance) -> Iterator[Shard]:
    """Score windows files, and publish the scores of each under its name in the folder `scores`.

    Args:
        windows: is iterated in a thread, ahead of need.
        advance: called for every window with its tokens, 1, and whether it failed.

    Yields:
        Every shard, when its scores are there.

    Raises:
        ShardRaised: a shard cannot be read or measured: the next one, or another of the next few.
        OSError: scores cannot be written.
    """
    for path, table in _measured(scorer, windows, advance):
        with publish(scores / path.name) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        lengths = table["n_tokens"].to_pylist()
        failures = [reason for reason in table["reason"].to_pylist() if reason is not None]
        counts = {
            "windows": table.num_rows,
            "failed": len(failures),
            "tokens": sum(lengths),
            "reasons": dict(Counter(failures)),
        }
        yield Shard(path.stem, counts, max(lengths, default=0))


def _measured(scorer: Scorer, windows: Iterable[Path], advance: Advance) -> Iterator[tuple[Path, pa.Table]]:
    measured = scorer.score_shards(windows, lambda tokens, ok: advance(tokens, 1, not ok))
    while True:
        try:
            shard = next(measured, None)
        except LongsiftError:
            raise
        except Exception as error:  # of a damaged file, of memory, of a library: whatever it is, others may do well
            raise ShardRaised(", ".join([_words(error), *getattr(error, "__notes__", [])])) from error
        if shard is None:
            return
        yield shard


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class Patience:
    """Ends what sets one shard aside after another."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def scored(self) -> None:
        """A shard was scored."""
        self._in_a_row = 0

    def set_aside(self, why: str) -> None:
        """A shard was set aside.

        Raises:
            ProcessLost: so were many before it, and none was scored between.
        """
        self._in_a_row += 1
        if self._in_a_row == _HOPELESS:
            raise ProcessLost(
                f"{_HOPELESS} shards in a row could not be scored, so it is not the shards: {why}. Those that were "
                "scored before are kept; once that is mended, the same command goes on where it stopped."
            )


class Ahead:
    """What was told of shards that are not yet published: tokens, windows and failed windows."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._amounts = advance, [0, 0, 0]

    def advance(self, *amounts: int) -> None:
        """Tell of more."""
        self._add(*amounts)
        self._advance(*amounts)

    def settle(self, shard: Shard) -> None:
        """Of what was told, these are published."""
        self._add(*(-shard.counts[name] for name in ("tokens", "windows", "failed")))

    def take_back(self) -> None:
        """The rest is lost, and will be told of again."""
        self.advance(*(-amount for amount in self._amounts))

    def _add(self, *amounts: int) -> None:
        self._amounts = [a + b for a, b in zip(self._amounts, amounts, strict=True)]


def score_each(
    scorer: Scorer,
    windows: Sequence[Path],
    scores: Path,
    *,
    on_done: Callable[[Shard], None],
    on_set_aside: Callable[[Path, str], None],
    on_advance: Advance,
) -> None:
    """Score windows files in this process; the callbacks are those of `LocalEngine`.

    Raises:
        OSError: scores cannot be written.
        ProcessLost: nothing but failures came.
        LongsiftError: what concerns all of them.
    """
    left = deque(windows)
    alone = False
    patience = Patience()
    while left:
        ahead = Ahead(on_advance)
        try:
            for shard in score_files(scorer, [left[0]] if alone else list(left), scores, ahead.advance):
                left.popleft()
                ahead.settle(shard)
                patience.scored()
                on_done(shard)
            alone = False
        except ShardRaised as error:
            ahead.take_back()
            if alone:
                on_set_aside(left.popleft(), str(error))
                patience.set_aside(str(error))
            else:
                log.warning("%s or one soon after it raised (%s); it is tried once more, alone", left[0].name, error)
            alone = not alone


def devices(options: ScoreOptions) -> list[str]:
    """The device of every process: each GPU once, or the one that `--device` names, unless `--workers` says how many.

    Raises:
        UsageError: no such device here.
    """
    import torch

    from longsift.scoring import resolve_device

    chosen = resolve_device(options.device)
    if str(chosen) == "cuda":  # without a number
        gpus = torch.cuda.device_count()
        return [f"cuda:{i % gpus}" for i in range(options.workers or gpus)]
    return [str(chosen)] * (options.workers or 1)


def score_in_process(
    link: Link, scores: Path, model: ModelOptions, options: ScoreOptions, device: str, threads: int | None
) -> None:
    """What a process does: score every shard that it is sent, until it is sent None."""
    import torch

    from longsift.scoring import Scorer

    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    scorer = Scorer.from_options(model, replace(options, device=device))
    link.send(facts_of(scorer))
    done = [0, 0, 0]
    said = time.monotonic()

    def say() -> None:
        nonlocal said
        said = time.monotonic()
        link.send(tuple(done))
        done[:] = 0, 0, 0

    def advance(*amounts: int) -> None:
        done[:] = map(sum, zip(done, amounts, strict=True))
        if time.monotonic() - said >= _SAY_EVERY:
            say()

    for shard in score_files(scorer, iter(link.receive, None), scores, advance):
        say()
        link.send(shard)


@dataclass(slots=True, eq=False)
class _Process:
    child: Child
    device: str
    ahead: Ahead
    shards: deque[Path] = field(default_factory=deque)  # handed out and not yet published, in order
    facts: Facts | None = None


class LocalEngine:
    """Scores shards in processes of its own; a context manager, at whose end they are gone.

    A process that dies, or in which a shard raises, is replaced, and its shards are tried once more, each alone; one
    that fails again is set aside. A device on which no process can begin any more is left to rest.

    Args:
        scores: folder in which the scores are published.
        model, options: what the scorers are made of.
        devices: one for every process; on a CPU they share its cores.
        on_ready: called when the first process begins to score.
        on_done: called for every shard whose scores are published.
        on_set_aside: called with every shard that has failed twice, and why.
        on_advance: called with tokens, windows and failed windows as they are measured; less than 0 when they must be
            measured again. All four are called in the engine's own thread.
    """

    def __init__(
        self,
        scores: Path,
        model: ModelOptions,
        options: ScoreOptions,
        devices: Sequence[str],
        *,
        on_ready: Callable[[], None],
        on_done: Callable[[Shard], None],
        on_set_aside: Callable[[Path, str], None],
        on_advance: Advance,
    ) -> None:
        self._scores, self._model, self._options, self._devices = scores, model, options, devices
        self._on_ready, self._on_done = on_ready, on_done
        self._on_set_aside, self._on_advance = on_set_aside, on_advance
        self._patience = Patience()
        self._pending: deque[Path] = deque()
        self._suspects: set[Path] = set()  # of processes that were lost
        self._processes: list[_Process] = []
        self._error: BaseException | None = None
        self._facts: Facts | None = None
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="longsift-engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def submit(self, windows: Path) -> None:
        """Have a windows file scored.

        Raises:
            LongsiftError: the engine has failed.
        """
        self.check()
        self._pending.append(windows)

    def check(self) -> None:
        """Raise what the engine has failed with, if it has."""
        if self._error is not None:
            raise self._error

    def finish(self) -> Facts:
        """Wait until all that was submitted is published or set aside.

        Raises:
            ProcessLost: no process could begin or go on, or nothing but failures came.
            OSError: scores cannot be written.
            LongsiftError: what concerns all shards, such as a calculator that cannot be loaded.
        """
        self._closing = True
        self._thread.join()
        self.check()
        assert self._facts is not None
        return self._facts

    def under_way(self) -> list[str]:
        """The names of the shards that processes have now."""
        return [path.stem for process in list(self._processes) for path in list(process.shards)]

    def _run(self) -> None:
        try:
            self._processes = [self._start(device) for device in self._devices]
            while not self._stopped and not (self._closing and self._facts and self._idle()):
                self._hand_out()
                for ready in wait([process.child.connection for process in self._processes], _POLL):
                    self._hear(next(process for process in self._processes if process.child.connection is ready))
        except BaseException as error:  # it is raised where the engine is used
            self._error = error
        finally:
            stop(process.child for process in self._processes)

    def _idle(self) -> bool:
        return not self._pending and not any(process.shards for process in self._processes)

    def _start(self, device: str) -> _Process:
        threads = None
        if device == "cpu":
            import torch

            threads = max(1, torch.get_num_threads() // len(self._devices))
        child = Child(_TARGET, self._scores, self._model, self._options, device, threads)
        return _Process(child, device, Ahead(self._on_advance))

    def _hand_out(self) -> None:
        for process in sorted(self._processes, key=lambda process: len(process.shards)):
            while self._pending and len(process.shards) < _AHEAD:
                alone = process.shards and not self._suspects.isdisjoint((self._pending[0], *process.shards))
                if process.facts is None or alone:
                    break
                path = self._pending.popleft()
                process.shards.append(path)
                try:
                    process.child.connection.send(path)
                except OSError:  # it has ended, which is noticed when it is heard
                    break

    def _hear(self, process: _Process) -> None:
        try:
            message = process.child.receive()
        except EOFError:
            self._lose(process, process.child.how_it_ended(), None)
            return
        match message:
            case Facts():
                process.facts = message
                if self._facts is None:
                    self._facts = message
                    self._on_ready()
            case Shard():
                process.shards.popleft()
                process.ahead.settle(message)
                self._patience.scored()
                self._on_done(message)
            case Failure(error=LongsiftError() | OSError() as error):
                raise error
            case Failure(error=ShardRaised() as error):
                self._lose(process, str(error), error)
            case Failure(error=error):
                self._lose(process, ", ".join([_words(error), *getattr(error, "__notes__", [])[:-1]]), error)
            case (tokens, windows, failed):
                process.ahead.advance(tokens, windows, failed)

    def _lose(self, process: _Process, why: str, cause: BaseException | None) -> None:
        """Replace a process that has ended, and have its shards tried once more, each alone, or set aside."""
        process.child.stop()
        place = self._processes.index(process)
        if process.facts is None:
            if len(self._processes) == 1:
                raise ProcessLost(
                    f"A process on {process.device} ended before it could score anything ({why}). Is there memory "
                    "enough? The same command goes on where it stopped; --workers asks for fewer processes."
                ) from cause
            log.warning("a process on %s ended before it could score (%s): one fewer from now on", process.device, why)
            del self._processes[place]
            return
        process.ahead.take_back()
        if len(process.shards) == 1 and process.shards[0] in self._suspects:
            self._on_set_aside(process.shards.popleft(), why)
            self._patience.set_aside(why)
        else:
            names = ", ".join(path.name for path in process.shards) or "nothing"
            log.warning("a process on %s ended (%s) at %s, which is tried once more", process.device, why, names)
            self._suspects.update(process.shards)
            self._pending.extendleft(reversed(process.shards))
        self._processes[place] = self._start(process.device)
