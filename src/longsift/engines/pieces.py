"""Pieces of files are cut into windows by this process and others: all at one piece, or each at its own."""

from __future__ import annotations

import logging
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from longsift.documents import BadRow, Document, read_piece
from longsift.engines.children import Child, Failure, Link, stop
from longsift.engines.cutters import Cutters
from longsift.errors import InputError, ProcessLost
from longsift.options import ModelOptions, WindowOptions
from longsift.pieces import Cutter, Job, Place, RowNumbers, Unread, part_number, parts_by_shard
from longsift.progress import Progress
from longsift.shards import RunFolder
from longsift.sources import Piece
from longsift.windows import TooShort, Window, WindowTokenizer

log = logging.getLogger(__name__)

# For each process, from which on each cuts whole pieces: with fewer, some would have nothing to do at the end.
_PIECES_EACH = 4
_TARGET = f"{__name__}:cut_in_process"
_BYTES_EACH = 2 << 20  # of sources, often compressed, for which another process that cuts is worth its start


def cut_pieces(
    pieces: Mapping[str, Piece],
    folder: RunFolder,
    model: ModelOptions,
    options: WindowOptions,
    progress: Progress,
    on_part: Callable[[Path], None] = lambda path: None,
    on_begin: Callable[[str], None] = lambda shard: None,
    *,
    read_before: int = 0,
) -> list[str]:
    """Cut pieces, by their shards, which have no records yet, and record each one that is done.

    Args:
        on_part: called for every file of windows when it is there.
        on_begin: called with every shard before it is cut.
        read_before: documents of other pieces, which count for `options.limit`.

    Returns:
        Why, for each file that could not be read or not to its end; all other pieces are done.
    """
    cutter = Cutter(model, options)
    begun = {shard: Place(**content) for shard, content in folder.places().items()}
    windows, quarantine = parts_by_shard(folder.windows), parts_by_shard(folder.quarantine)
    jobs = [
        Job(shard, piece, begun.get(shard, Place()), windows.get(shard, []), quarantine.get(shard, []))
        for shard, piece in pieces.items()
    ]
    for job in jobs:
        for path in job.windows:
            if part_number(path) < job.place.windows:
                on_part(path)
    processes = _processes(options, sum(piece.size for piece in pieces.values()))
    if options.limit is None and processes > 1 and len(jobs) >= _PIECES_EACH * processes:
        unread = _Apart(processes, jobs, folder, cutter, progress, on_part, on_begin).cut()
    else:
        unread = _cut_together(jobs, processes, folder, cutter, progress, on_part, on_begin, read_before)
    return list(unread.values())


def _cut_together(
    jobs: Sequence[Job],
    processes: int,
    folder: RunFolder,
    cutter: Cutter,
    progress: Progress,
    on_part: Callable[[Path], None],
    on_begin: Callable[[str], None],
    read_before: int,
) -> dict[str, str]:
    """Cut pieces one after the other: this process reads and writes, and as many as are worth it tokenise and cut.

    Returns:
        Why, by the url of each file that could not be read.
    """
    numbers, options = RowNumbers(folder, cutter.options.piece_bytes), cutter.options
    records: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}

    def read(job: Job, left: int | None) -> Iterator[Document | BadRow]:
        end: int | None = None

        def all_rows(first: int) -> Iterator[Document | BadRow]:
            nonlocal end
            end = yield from read_piece(job.piece, first, cutter.read, progress.advance)

        try:
            first = numbers.first(job.shard, job.piece)
            documents = all_rows(first) if left is None else first_documents(all_rows(first), left)
            yield from islice(documents, job.place.rows, None)
        except InputError as error:
            yield Unread(job.piece.source.url, None, str(error), "")
        else:
            if end is not None:
                numbers.note(job.shard, job.piece, end - first)

    def rows() -> Iterator[Iterator[Document | BadRow]]:
        left = None if options.limit is None else options.limit - read_before
        for job in jobs:
            yield read(job, left)
            if left is not None:
                left -= records[job.shard]["documents"]

    with ExitStack() as stack:
        cut_rows: Iterator[Iterator[Window | TooShort | BadRow]]
        if processes > 1:
            cutters = stack.enter_context(Cutters(processes, lambda: cutter.loaded))
            # With a limit, what is read of a piece depends on how many documents those before it had.
            together = [rows()] if options.limit is None else ([some] for some in rows())
            cut_rows = chain.from_iterable(map(cutters.cut_each, together))
        else:
            cut_rows = map(cutter.windows, rows())
        for job, cut in zip(jobs, cut_rows, strict=True):
            on_begin(job.shard)
            try:
                records[job.shard] = cutter.keep(cut, job, folder, progress, on_part)
            except InputError as error:
                if options.limit is not None:
                    raise
                unread.setdefault(job.piece.source.url, str(error))
    return unread


class _Apart:
    """Cuts pieces in processes that each read and write their own: one that reads for all holds up many.

    Args:
        processes: how many.
        jobs: what to cut.
    """

    def __init__(
        self,
        processes: int,
        jobs: Iterable[Job],
        folder: RunFolder,
        cutter: Cutter,
        progress: Progress,
        on_part: Callable[[Path], None],
        on_begin: Callable[[str], None],
    ) -> None:
        self._processes, self._left = processes, deque(jobs)
        self._folder, self._cutter, self._progress = folder, cutter, progress
        self._on_part, self._on_begin = on_part, on_begin
        self._numbers = RowNumbers(folder, cutter.options.piece_bytes)
        self._state: bytes | None = None  # tokenizer and length
        self._lost: set[str] = set()  # shards at which a process has ended
        self._unread: dict[str, str] = {}
        self._children: list[Child] = []
        self._busy: dict[Connection, _Busy] = {}

    def cut(self) -> dict[str, str]:
        """Do it.

        Returns:
            Why, by the url of each file that could not be read.

        Raises:
            ProcessLost: two processes ended by themselves at the same piece.
        """
        try:
            for _ in range(self._processes):
                self._begin()
            while self._busy:
                ready = wait([*self._busy])
                for busy in [busy for connection, busy in self._busy.items() if connection in ready]:
                    self._hear(busy)
        finally:
            stop(self._children)
        return self._unread

    def _begin(self) -> None:
        child = Child(_TARGET, self._folder.path, self._cutter.model, self._cutter.options)
        self._children.append(child)
        self._give(child)

    def _give(self, child: Child) -> None:
        """Have a process cut the next piece, if there is one."""
        self._busy.pop(child.connection, None)
        while self._left:
            job = self._left.popleft()
            try:
                first = self._numbers.first(job.shard, job.piece)
            except InputError as error:
                self._unread.setdefault(job.piece.source.url, str(error))
                continue
            self._on_begin(job.shard)
            self._busy[child.connection] = _Busy(child, job, _Told())
            with suppress(OSError):  # of one that has ended, which is noticed when it is heard
                child.connection.send((job, first))
            return

    def _hear(self, busy: _Busy) -> None:
        try:
            told = busy.child.receive()
        except EOFError:
            self._lose(busy)
            return
        if isinstance(told, Failure):
            raise told.error
        if told is None:
            self._state = self._state or pickle.dumps(self._cutter.loaded)  # that of a large vocabulary takes a while
            with suppress(OSError):
                busy.child.connection.send(self._state)
            return
        self._progress.advance(told.bytes - busy.told.bytes, windows=told.windows - busy.told.windows)
        busy.told = told
        if told.part is not None:
            self._on_part(told.part)
        if told.ended:
            if told.unread is not None:
                self._unread.setdefault(busy.job.piece.source.url, told.unread)
            self._give(busy.child)

    def _lose(self, busy: _Busy) -> None:
        """Have another process go on with the piece of one that has ended; not twice with that which it ended at."""
        how, job = busy.child.how_it_ended(), busy.job
        where = f"piece {job.shard} ({job.piece.source.url})"
        if job.shard in self._lost:
            raise ProcessLost(
                f"Two processes that cut windows ended ({how}) at {where}. Is there memory enough? "
                "The same command goes on where it stopped; --cut-workers asks for fewer processes."
            )
        log.warning("a process that cuts windows ended (%s) at %s, which is tried once more", how, where)
        self._lost.add(job.shard)
        self._progress.advance(-busy.told.bytes, windows=-busy.told.windows)
        del self._busy[busy.child.connection]
        self._children.remove(busy.child)
        busy.child.stop()
        self._left.appendleft(replace(job, place=Place(**self._folder.places().get(job.shard, {}))))
        self._begin()


@dataclass(slots=True)
class _Busy:
    """A process, the piece that it has, and what it has told of it last."""

    child: Child
    job: Job
    told: _Told


@dataclass(frozen=True, slots=True)
class _Told:
    """What a process that cuts a piece has done of it.

    Attributes:
        bytes, windows: read and cut so far.
        part: a file of windows that is there now.
        ended: it has done what it can.
        unread: why it could not read the piece to its end.
    """

    bytes: int = 0
    windows: int = 0
    part: Path | None = None
    ended: bool = False
    unread: str | None = None


def cut_in_process(link: Link, out: Path, model: ModelOptions, options: WindowOptions) -> None:
    """What a process does: cut the pieces that it is sent, and say how far it is; None asks for the tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core

    def load() -> tuple[WindowTokenizer, int]:
        link.send(None)
        loaded: tuple[WindowTokenizer, int] = pickle.loads(link.receive())
        return loaded

    folder, cutter = RunFolder(out), Cutter(model, options, load)
    while True:
        job, first = link.receive()
        _cut_and_tell(job, first, folder, cutter, link)


def _cut_and_tell(job: Job, first: int, folder: RunFolder, cutter: Cutter, link: Link) -> None:
    progress = Progress("windows", job.piece.size, "bytes", quiet=True)

    def tell(part: Path | None = None, *, ended: bool = False, unread: str | None = None) -> None:
        link.send(_Told(progress.done, progress.counts.get("windows", 0), part, ended, unread))

    rows = read_piece(job.piece, first, cutter.read, progress.advance)
    try:
        cutter.keep(cutter.windows(islice(rows, job.place.rows, None)), job, folder, progress, tell)
    except InputError as error:
        tell(ended=True, unread=str(error))
    else:
        tell(ended=True)


def _processes(options: WindowOptions, size: int) -> int:
    """How many processes cut `size` bytes of sources: as asked, or one a core, but none for less than a few seconds."""
    if options.cut_workers is not None:
        return options.cut_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, size // _BYTES_EACH)


def first_documents(rows: Iterable[Document | BadRow], limit: int) -> Iterator[Document | BadRow]:
    left = limit
    if left <= 0:
        return
    for row in rows:
        yield row
        left -= isinstance(row, Document)
        if left == 0:
            return
