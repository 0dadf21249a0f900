"""Windows on their way to the device: read, checked, grouped by length and laid out ahead of need.

Batches hold windows of one length, so nothing is padded; how windows are grouped decides speed alone, never a score.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from longsift.errors import ModelError
from longsift.tables import SCORE_KEYS, WINDOWS

_READ_ROWS = 16  # windows read at a time
_HELD = 4  # batches' worth of tokens that wait for others of their length, at most

T = TypeVar("T")


@dataclass(slots=True)
class Row:
    """One window and, in time, what became of it.

    Attributes:
        keys: its columns of the scores table that do not depend on the method; may be empty.
        input_ids: (n_tokens,) int32, until it is laid out in a batch.
        result: the method's columns, or why there are none; None until it is measured.
    """

    keys: dict[str, Any]
    input_ids: npt.NDArray[np.int32] | None
    n_tokens: int
    result: dict[str, Any] | ModelError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one length, ready to be copied to the device: `ids` (n, length) int32, pinned where that helps."""

    rows: list[Row]
    ids: torch.Tensor

    def parts(self, size: int) -> list[Batch]:
        """The same windows, `size` at a time."""
        return [Batch(self.rows[i : i + size], self.ids[i : i + size]) for i in range(0, len(self.rows), size)]


@dataclass(slots=True)
class Shard:
    """A windows file, and a row for each of its windows in the order of the file."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def keep(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on and keep them."""
        for row in rows:
            self.rows.append(row)
            yield row


def read_rows(path: Path) -> Iterator[Row]:
    """The windows of a file, in order, a few in memory at a time."""
    keys = [name for name in SCORE_KEYS.names if name in WINDOWS.names]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=[*keys, "input_ids"]):
            ids = batch.column("input_ids")
            for i, row in enumerate(batch.select(keys).to_pylist()):
                input_ids = ids[i].values.to_numpy()
                yield Row(row | {"ids_hash": ids_hash(input_ids)}, input_ids, len(input_ids))


def ids_hash(input_ids: npt.NDArray[np.int32]) -> bytes:
    """What tells the ids of a window from others: BLAKE2b of them as little-endian int32, 16 bytes."""
    return hashlib.blake2b(input_ids.astype("<i4").tobytes(), digest_size=16).digest()


def group_rows(rows: Iterable[Row], tokens: int, *, pinned: bool) -> Iterator[Batch]:
    """Group windows by length into batches of `tokens` tokens, or of one longer window.

    Windows that wait for others of their length hold `_HELD` times `tokens` tokens at most, and one window more.

    Args:
        pinned: lay them out in page-locked memory, from which a GPU copies while the host goes on.
    """
    waiting: dict[int, list[Row]] = {}
    held = 0
    for row in rows:
        same = waiting.setdefault(row.n_tokens, [])
        same.append(row)
        held += row.n_tokens
        full = (len(same) + 1) * row.n_tokens > tokens
        if full or held > _HELD * tokens:
            length = row.n_tokens if full else max(waiting, key=lambda length: length * len(waiting[length]))
            some = waiting.pop(length)
            held -= length * len(some)
            yield _lay_out(some, pinned)
    for some in waiting.values():
        yield _lay_out(some, pinned)


def _lay_out(rows: list[Row], pinned: bool) -> Batch:
    ids = torch.empty(len(rows), rows[0].n_tokens, dtype=torch.int32, pin_memory=pinned)
    np.stack([row.input_ids for row in rows if row.input_ids is not None], out=ids.numpy())
    for row in rows:
        row.input_ids = None
    return Batch(rows, ids)


class Prefetched(Generic[T]):
    """The items of an iterable, made by a thread ahead of need; a context manager, which stops the thread.

    Args:
        items: is iterated in the thread; what it raises is raised where the item would have come.
        ahead: items that wait at most.
        around: makes a context in which the thread works.
    """

    def __init__(self, items: Iterable[T], ahead: int, around: Callable[[], Any]) -> None:
        self._items, self._around = items, around
        self._made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._make, name="longsift-prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=1.0)

    def ready(self) -> bool:
        """Whether the next item, or the end, is there without a wait."""
        return not self._made.empty()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        item, error = self._made.get()
        if error is not None:
            raise error
        assert item is not None
        return item

    def _make(self) -> None:
        end: BaseException = StopIteration()
        try:
            with self._around():
                for item in self._items:
                    if not self._put(item, None):
                        return
        except BaseException as error:  # it is the consumer's to handle, whatever it is
            end = error
        self._put(None, end)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._made.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
