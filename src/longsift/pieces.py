"""A piece of a file becomes parts of the windows table, and can be gone on with after each.

What is cut of a piece depends on nothing but the piece and the options, so that pieces can be cut anywhere, in any
order. A stopped piece is read again up to the row that its last part ended in, which takes little next to tokenising:
the same for every format, also for those that cannot be entered in the middle.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.documents import BadRow, Document, ReadOptions, count_lines
from longsift.errors import InputError
from longsift.options import ModelOptions, WindowOptions
from longsift.progress import Progress
from longsift.shards import RunFolder, piece_name
from longsift.sources import Piece
from longsift.tables import QUARANTINE, parquet_files, publish
from longsift.windows import (
    BottomK,
    Tally,
    TooShort,
    Window,
    WindowTokenizer,
    cut_windows,
    is_text,
    sample_key,
    windows_table,
)

DEFAULT_WINDOW = 32_768
_QUARANTINE_ROWS = 10_000  # of a file
_COUNTS = ("documents", "too_short", "too_short_tokens", "windows", "tokens")  # of a `Tally`
# Scoring a row of ids takes memory in proportion to its length: with the embedded calculator, which is made for windows
# of 32,768, 9 KB an id. So it keeps within 1.5 GB.
_EMBEDDED_IDS = 1 << 16

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Job:
    """A piece that is to be cut, and what an earlier process has left of it."""

    shard: str
    piece: Piece
    place: Place
    windows: list[Path]
    quarantine: list[Path]


def uncounted(folder: RunFolder) -> list[str]:
    """The pieces whose lines have to be counted before those after them, in the same file, are cut without them."""
    counts = folder.line_counts()
    return [
        shard
        for shard, piece in folder.pieces().items()
        if piece.source.format == "jsonl" and piece.stop < piece.source.size and shard not in counts
    ]


class RowNumbers:
    """Which row of its file each piece begins with: of JSON lines, the lines of those before it tell."""

    def __init__(self, folder: RunFolder, piece_bytes: int) -> None:
        self._folder, self._piece_bytes = folder, piece_bytes
        self._lines = folder.line_counts()
        self._firsts: dict[str, list[int]] = {}  # of the pieces of a file, as far as they are known

    def first(self, shard: str, piece: Piece) -> int:
        """Of a format that tells it by itself, 0; lines that nothing has counted yet are counted.

        Raises:
            InputError: the file cannot be read.
        """
        if piece.source.format != "jsonl" or piece.start == 0:
            return 0
        file, _, index = shard.partition("-")
        firsts = self._firsts.setdefault(file, [0])
        if len(firsts) <= int(index):
            before = piece.source.pieces(self._piece_bytes)
            for number in range(len(firsts) - 1, int(index)):
                name = piece_name(int(file), number)
                if name not in self._lines:
                    self.note(name, before[number], count_lines(before[number]))
                firsts.append(firsts[-1] + self._lines[name])
        return firsts[int(index)]

    def note(self, shard: str, piece: Piece, lines: int) -> None:
        """Remember, beyond this process, how many lines begin in a piece."""
        if piece.source.format == "jsonl" and piece.stop < piece.source.size:
            self._lines[shard] = lines
            self._folder.note_lines(shard, lines)


@dataclass(frozen=True)
class Place:
    """How far a piece was cut when a part of its windows was written.

    Attributes:
        rows: documents and bad rows before the one that its last window is of.
        row_windows: of that one, which are written.
        windows, quarantine: numbers of the next file of each.
        record: what was counted so far, as in the record of a finished piece.
    """

    rows: int = 0
    row_windows: int = 0
    windows: int = 0
    quarantine: int = 0
    record: dict[str, Any] = field(default_factory=dict)


class Cutter:
    """Turns rows into windows and keeps these in files.

    Args:
        load: gives the tokenizer and the tokens of a window of text, at the first row of text; by default those of the
            model.
    """

    def __init__(
        self,
        model: ModelOptions,
        options: WindowOptions,
        load: Callable[[], tuple[WindowTokenizer, int]] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.read = ReadOptions(
            text_key=options.text_key,
            id_key=options.id_key,
            group_by=options.group_by,
            tab_ids=options.tab_ids,
            max_ids=_EMBEDDED_IDS if model.model in (None, "embedded") else ReadOptions().max_ids,
        )
        self.sample = BottomK(options.sample) if options.sample else None
        self._load = load or self._load_model

    @cached_property
    def loaded(self) -> tuple[WindowTokenizer, int]:
        """The tokenizer, and the tokens in a window of text."""
        return self._load()

    def _load_model(self) -> tuple[WindowTokenizer, int]:
        model, length = self.model.model or "embedded", self.options.window
        if length is None:  # the papers' 32,768, or what the calculator supports
            from longsift.calculators.checkpoint import locate
            from longsift.calculators.interface import read_config

            location = locate(model, self.model.revision)
            config = read_config(location, trust_remote_code=self.model.trust_remote_code)
            length = min(DEFAULT_WINDOW, getattr(config, "max_position_embeddings", None) or DEFAULT_WINDOW)
        return load_tokenizer(model, self.model.revision, self.model.trust_remote_code), length

    def keep(
        self,
        rows: Iterable[Window | TooShort | BadRow],
        job: Job,
        folder: RunFolder,
        progress: Progress,
        on_part: Callable[[Path], None],
    ) -> dict[str, Any]:
        """Write what became of one piece into its parts, and record that; returns what was counted.

        Args:
            rows: of the piece, from its row `job.place.rows` on.

        Raises:
            InputError: the file could not be read, or not to its end.
        """
        place = job.place
        windows = _Parts(folder.windows, job.shard, windows_table, job.windows, on_part, place.windows)
        quarantine = _Parts(folder.quarantine, job.shard, _quarantine_table, job.quarantine, number=place.quarantine)
        started = time.perf_counter()
        tally = Tally(
            **{name: place.record.get(name, 0) for name in _COUNTS},
            bad_rows=Counter(place.record.get("reasons", {})),
        )
        tokens = 0
        unread: Unread | None = None

        def record() -> dict[str, Any]:
            counts = {name: getattr(tally, name) for name in _COUNTS}
            seconds = place.record.get("seconds", 0.0) + time.perf_counter() - started
            about = {key: value or place.record.get(key) for key, value in self._describe().items()}
            return {
                **counts,
                "bad_rows": tally.bad_rows.total(),
                "reasons": dict(tally.bad_rows),
                "seconds": round(seconds, 3),
                "ended": time.time(),
                **about,
            }

        written = place.row_windows
        for row in rows:
            if isinstance(row, Unread):
                unread = row  # the last, but rows have to be used up
                continue
            if written:
                written -= 1
                continue
            tally.add(row)
            if isinstance(row, BadRow):
                quarantine.add(row)
                if len(quarantine.held) >= _QUARANTINE_ROWS:
                    quarantine.write()
            elif isinstance(row, Window):
                progress.count(windows=1)
                if self.sample is None or self.sample.offer(sample_key(row.window_id, self.options.seed)):
                    windows.add(row)
                tokens += len(row.input_ids)
                if tokens >= self.options.shard_tokens:
                    quarantine.write()
                    windows.write()
                    tokens = 0
                    before = tally.documents + tally.bad_rows.total() - 1
                    reached = Place(before, row.index + 1, windows.number, quarantine.number, record())
                    folder.mark_place(job.shard, dataclasses.asdict(reached))
        if unread is not None:
            raise InputError(unread.reason)
        windows.end()
        quarantine.end()
        counted = record()
        folder.record("windows", job.shard, counted)
        return counted

    def windows(self, rows: Iterable[Document | BadRow]) -> Iterator[Window | TooShort | BadRow]:
        # Rows that carry ids need no tokenizer, so one is loaded only where a row of text comes.
        for needed, run in groupby(rows, is_text):
            tokenizer, length = self.loaded if needed else (None, None)
            yield from cut_windows(run, tokenizer, length)

    def _describe(self) -> dict[str, Any]:
        """The tokenizer's fingerprint and the window length; null while no row was text."""
        tokenizer, length = self.__dict__.get("loaded", (None, None))
        return {"tokenizer": tokenizer and tokenizer.fingerprint, "length": length}


class Unread(BadRow):
    """In place of the rows that a source could not give: it goes the way that they would have gone."""


@dataclass
class _Parts(Generic[Row]):
    """Rows of one shard that are written a file at a time, `<shard>-<part>.parquet`."""

    folder: Path
    shard: str
    as_table: Callable[[list[Row]], pa.Table]
    there: list[Path]  # of an earlier process
    on_part: Callable[[Path], None] = lambda path: None
    number: int = 0  # of the part that is next
    held: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.held.append(row)

    def write(self) -> None:
        """End a part; one without rows has a number and no file, so that what a part is called tells what it is of."""
        if self.held:
            path = self.folder / f"{self.shard}-{self.number:05d}.parquet"
            with publish(path) as temporary:
                pq.write_table(self.as_table(self.held), temporary, compression="zstd")
            self.held = []
            self.on_part(path)
        self.number += 1

    def end(self) -> None:
        """Write the last part. What an earlier process wrote beyond is of another version of what cuts."""
        self.write()
        for path in self.there:
            if part_number(path) >= self.number:
                path.unlink(missing_ok=True)


def parts_by_shard(folder: Path) -> dict[str, list[Path]]:
    """The parts that are there by their shards, in order; the folder is listed once for all."""
    parts: dict[str, list[Path]] = {}
    for path in parquet_files(folder):
        parts.setdefault(path.stem.rpartition("-")[0], []).append(path)
    return parts


def part_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _quarantine_table(rows: list[BadRow]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=QUARANTINE)


def load_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> WindowTokenizer:
    from longsift.calculators.checkpoint import locate

    location = locate(model, revision)
    return WindowTokenizer.load(location.pretrained, location.revision, trust_remote_code)
