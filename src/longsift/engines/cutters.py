"""Processes that tokenise and cut: the parent reads documents and gets their windows back in the same order.

Threads of one process do not scale to many cores here: turning tokens into arrays holds Python's lock, and the
tokenizer's own threads share a cache. Which process cuts which documents changes no window.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self, TypeAlias

from longsift.documents import BadRow, Document
from longsift.engines.children import Child, Failure, Link, stop
from longsift.errors import ProcessLost
from longsift.windows import TooShort, Window, WindowTokenizer, cut_windows, is_text, row_batches, weight

log = logging.getLogger(__name__)

Row: TypeAlias = Document | BadRow
Piece: TypeAlias = Window | TooShort | BadRow

_CHARS = 1 << 20  # of the documents that a process gets at a time: some tenths of a second of work
_GIANT_CHARS = 1 << 24  # more than this is cut here, where the tokenizer's threads share one document
_EACH = 2  # batches that a process has at a time: the next is there when it is done with one
_TARGET = f"{__name__}:cut_in_process"
_HELD = 4  # batches for each process that may wait for one before them


@dataclass(slots=True, eq=False)
class _Batch:
    rows: list[Row]
    cut: list[Piece] | None = None  # what became of them
    lost: bool = False  # a process ended at them


@dataclass(frozen=True, slots=True)
class _Cutter:
    child: Child
    batches: deque[_Batch]  # that it has, in order


def cut_in_process(link: Link) -> None:
    """What a process does: cut the documents that it is sent, with the tokenizer and length that come first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    tokenizer, length = pickle.loads(link.receive())
    while True:
        link.send(list(cut_windows(link.receive(), tokenizer, length)))


class Cutters:
    """Cuts documents in processes of its own; a context manager, at whose end they are gone.

    Args:
        processes: how many; they are started when the first text comes.
        load: gives the tokenizer, and the tokens of a window of text.
    """

    def __init__(self, processes: int, load: Callable[[], tuple[WindowTokenizer, int]]) -> None:
        self._processes, self._load = processes, load
        self._cutters: list[_Cutter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(cutter.child for cutter in self._cutters)

    def cut_each(self, sources: Iterable[Iterable[Row]]) -> Iterator[Iterator[Piece]]:
        """Cut the rows of several sources, while those after them are read.

        Yields:
            For each source what `cut_windows` gives for its rows, to be used up before the next is asked for.

        Raises:
            ProcessLost: two processes ended by themselves at the same documents.
            Exception: what `sources` raise, when all rows before it were given out.
        """
        batches = self._cut(_batches(sources))
        for first in batches:
            yield chain.from_iterable(_of_one_source(first, batches))

    def _cut(self, batches: Iterator[_Batch | None]) -> Iterator[_Batch | None]:
        """The batches, cut, in their order; None, the end of a source, keeps its place among them."""
        held: deque[_Batch | None] = deque()
        end: Exception | None = None
        while end is None or held:
            while end is None and len(held) < _HELD * self._processes and self._room():
                try:
                    batch = next(batches)
                except Exception as error:
                    end = error
                    break
                held.append(batch)
                if batch is not None:
                    self._begin(batch)
            while held and (held[0] is None or held[0].cut is not None):
                yield held.popleft()
            if held:
                self._hear()
        if not isinstance(end, StopIteration):
            raise end

    def _room(self) -> bool:
        return not self._cutters or any(len(cutter.batches) < _EACH for cutter in self._cutters)

    def _begin(self, batch: _Batch) -> None:
        """Hand a batch to the process that has the fewest, or cut it here: ids need no tokenizer, giants every core."""
        if not is_text(batch.rows[0]):
            batch.cut = list(cut_windows(batch.rows))
            return
        tokenizer, length = self._load()
        if sum(map(weight, batch.rows)) > _GIANT_CHARS:
            batch.cut = list(cut_windows(batch.rows, tokenizer, length))
            return
        if not self._cutters:
            self._start(tokenizer, length)
        cutter = min(self._cutters, key=lambda cutter: len(cutter.batches))
        cutter.batches.append(batch)
        _send(cutter, batch.rows)

    def _start(self, tokenizer: WindowTokenizer, length: int) -> None:
        self._state = pickle.dumps((tokenizer, length))  # once: that of a large vocabulary takes a while
        for _ in range(self._processes):
            self._cutters.append(self._cutter(deque()))

    def _cutter(self, batches: deque[_Batch]) -> _Cutter:
        cutter = _Cutter(Child(_TARGET), batches)
        _send(cutter, self._state)
        for batch in batches:
            _send(cutter, batch.rows)
        return cutter

    def _hear(self) -> None:
        """Wait until some process has cut a batch."""
        for ready in wait([cutter.child.connection for cutter in self._cutters]):
            cutter = next(cutter for cutter in self._cutters if cutter.child.connection is ready)
            try:
                message = cutter.child.receive()
            except EOFError:
                self._lose(cutter)
                continue
            if isinstance(message, Failure):
                raise message.error
            cutter.batches.popleft().cut = message

    def _lose(self, cutter: _Cutter) -> None:
        """Have another process cut the batches of one that has ended; not twice those that it ended at."""
        how = cutter.child.how_it_ended()
        cutter.child.stop()
        place = self._cutters.index(cutter)
        if not cutter.batches:
            del self._cutters[place]
            return
        first = cutter.batches[0]
        rows = f"row {first.rows[0].row} of {first.rows[0].file} or one of the {len(first.rows)} from there"
        if first.lost:
            raise ProcessLost(
                f"Two processes that cut windows ended ({how}) at {rows}. Is there memory enough? "
                "The same command goes on where it stopped; --cut-workers asks for fewer processes."
            )
        log.warning("a process that cuts windows ended (%s) at %s, which are tried once more", how, rows)
        first.lost = True
        self._cutters[place] = self._cutter(cutter.batches)


def _send(cutter: _Cutter, message: object) -> None:
    with suppress(OSError):  # of one that has ended, which is noticed when it is heard
        cutter.child.connection.send(message)


def _batches(sources: Iterable[Iterable[Row]]) -> Iterator[_Batch | None]:
    for rows in sources:
        for _, run in groupby(rows, is_text):
            yield from map(_Batch, row_batches(run, _CHARS))
        yield None


def _of_one_source(first: _Batch | None, rest: Iterator[_Batch | None]) -> Iterator[list[Piece]]:
    batch = first
    while batch is not None:
        yield batch.cut or []
        batch = next(rest)
