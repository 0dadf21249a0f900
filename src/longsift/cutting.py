"""The windows stage: source files become parts of the windows table, in order, resumable after every part.

The work is planned in pieces of files, each a shard of its own: what is cut of one depends on nothing but the file and
the options, so that pieces can be cut anywhere, in any order. A stopped piece is read again up to the row that its
last part ended in, which takes little next to tokenising: the same for every format, also for those that cannot be
entered in the middle.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.documents import BadRow, Document, ReadOptions, count_lines, read_piece
from longsift.engines.cutters import Cutters
from longsift.errors import InputError
from longsift.options import EngineOptions, ModelOptions, WindowOptions
from longsift.progress import Progress
from longsift.shards import RunFolder, piece_name, plan_pieces
from longsift.sources import Piece, Source, find_sources
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
_NAMED = 5  # files that could not be read and that an error names
_BYTES_EACH = 2 << 20  # of sources, often compressed, for which another process that cuts is worth its start

Row = TypeVar("Row")


def cut(
    inputs: Sequence[str],
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    options: WindowOptions = WindowOptions(),
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Read documents and cut them into windows of token ids, one piece of a file after the other.

    Args:
        inputs: files, folders, globs or urls (see `longsift.documents.find_sources`).
        out: folder of the run.
        cluster: cut them on a Ray cluster, not here.

    Returns:
        Counts: documents, bad_rows, too_short, windows, tokens.

    Raises:
        InputError: nothing to read, or a source that cannot be opened.
        OutputError: the folder holds windows of another run.
    """
    sources = find_sources(inputs)
    folder = RunFolder(out)
    with folder.lock():
        return cut_sources(sources, folder, model, options, overwrite=overwrite, quiet=quiet, cluster=cluster)


def cut_sources(
    sources: Sequence[Source],
    folder: RunFolder,
    model: ModelOptions,
    options: WindowOptions,
    *,
    overwrite: bool,
    quiet: bool,
    on_part: Callable[[Path], None] = lambda path: None,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Do as `cut` in a run folder whose lock is held.

    A file that cannot be read does not stop the others: it is tried again when the run goes on, from where it failed.

    Args:
        on_part: called for every file of the windows table, those of an earlier process too, when it is there.
        cluster: cut on a Ray cluster, where that can be; what its tasks cannot read is tried here once more.
    """
    if begin_windows(sources, folder, model, options, overwrite=overwrite):
        return dict(folder.section("windows")["counts"])
    pieces = plan_pieces(sources, options.piece_bytes)
    done = folder.records("windows")
    # In order, with what is left of an earlier process between them.
    for path in sorted(path for shard, paths in _parts(folder.windows).items() if shard in done for path in paths):
        on_part(path)
    size, cut_before = (sum(pieces[shard].size for shard in some) for some in (pieces, done))
    with Progress("windows", size, "bytes", done=cut_before, quiet=quiet) as progress:
        if cluster is not None and can_be_cut_elsewhere(sources, options):
            from longsift.engines.ray_cluster import cut_on_cluster

            cut_on_cluster(folder, model, options, cluster, [s for s in pieces if s not in done], progress)
            done = folder.records("windows")
        left = {shard: piece for shard, piece in pieces.items() if shard not in done}
        read_before = sum(record["documents"] for record in done.values())
        unread = cut_pieces(left, folder, model, options, progress, on_part, read_before=read_before)
    if unread:
        raise InputError(
            f"{len(unread):,} of {len(sources):,} files could not be read; all others were cut. The same command tries "
            "them again. " + "; ".join(unread[:_NAMED]) + ("; …" if len(unread) > _NAMED else "")
        )
    records = folder.records("windows").values()
    counts = _sum_counts(records)
    if options.sample is not None:
        _keep_sample(folder, options.sample, options.seed)
        counts |= {"windows_before_sample": counts["windows"], **_count_sample(folder)}
    seconds = sum(record["seconds"] for record in records)
    # A piece that another process cut may be the one that had text.
    text = {key: next((r[key] for r in records if r[key] is not None), None) for key in ("tokenizer", "length")}
    folder.finish("windows", {"counts": counts, "seconds": seconds, **text})
    return counts


def begin_windows(
    sources: Sequence[Source], folder: RunFolder, model: ModelOptions, options: WindowOptions, *, overwrite: bool
) -> bool:
    """Begin the windows stage of a run folder, or go on with it; returns True when it is done.

    Raises:
        OutputError: the folder holds windows of another run.
    """
    identity = {
        "inputs": [[source.url, source.size, source.version] for source in sources],
        "model": model.model or "embedded",
        "revision": model.revision,
        "text_key": options.text_key,
        "id_key": options.id_key,
        "group_by": options.group_by,
        "tab_ids": options.tab_ids,
        "window": options.window,
        "sample": options.sample,
        "seed": options.seed if options.sample else None,
        "limit": options.limit,
        "shard_tokens": options.shard_tokens,
        "piece_bytes": options.piece_bytes,
    }
    return folder.begin("windows", identity, overwrite=overwrite)


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
    places = {shard: begun.get(shard, Place()) for shard in pieces}
    numbers = _RowNumbers(folder, options.piece_bytes)
    windows, quarantine = _parts(folder.windows), _parts(folder.quarantine)
    for shard, place in places.items():
        for path in windows.get(shard, []):
            if _part_number(path) < place.windows:
                on_part(path)

    def read(shard: str, piece: Piece) -> Iterator[Document | BadRow]:
        try:
            first = numbers.first(shard, piece)
            end = yield from read_piece(piece, first, cutter.read, progress.advance)
        except InputError as error:
            yield _Unread(piece.source.url, None, str(error), "")
        else:
            numbers.note(shard, piece, end - first)

    def rows() -> Iterator[Iterator[Document | BadRow]]:
        left = None if options.limit is None else options.limit - read_before
        for shard, piece in pieces.items():
            documents = read(shard, piece)
            if left is not None:
                documents = first_documents(documents, left)
            yield islice(documents, places[shard].rows, None)
            if left is not None:
                left -= records[shard]["documents"]

    records: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}
    with ExitStack() as stack:
        processes = _processes(options, sum(piece.size for piece in pieces.values()))
        cut_rows: Iterator[Iterator[Window | TooShort | BadRow]]
        if processes > 1:
            cutters = stack.enter_context(Cutters(processes, lambda: (cutter.tokenizer, cutter.length)))
            # With a limit, what is read of a piece depends on how many documents those before it had.
            together = [rows()] if options.limit is None else ([some] for some in rows())
            cut_rows = chain.from_iterable(map(cutters.cut_each, together))
        else:
            cut_rows = map(cutter.windows, rows())
        for shard, cut in zip(pieces, cut_rows, strict=True):
            on_begin(shard)
            try:
                records[shard] = cutter.keep(
                    cut,
                    places[shard],
                    _Parts(folder.windows, shard, windows_table, windows.get(shard, []), on_part),
                    _Parts(folder.quarantine, shard, _quarantine_table, quarantine.get(shard, [])),
                    progress,
                    mark=partial(folder.mark_place, shard),
                )
            except InputError as error:
                if options.limit is not None:
                    raise
                unread.setdefault(pieces[shard].source.url, str(error))
            else:
                folder.record("windows", shard, records[shard])
    return list(unread.values())


def can_be_cut_elsewhere(sources: Sequence[Source], options: WindowOptions) -> bool:
    """Whether other machines can cut the pieces of these files.

    Not where a limit has one piece wait for those before it; nor where an address has a secret, which would have to be
    written down for them.
    """
    return options.limit is None and all(source.address == source.url for source in sources)


def uncounted(folder: RunFolder) -> list[str]:
    """The pieces whose lines have to be counted before those after them, in the same file, are cut without them."""
    counts = folder.line_counts()
    return [
        shard
        for shard, piece in folder.pieces().items()
        if piece.source.format == "jsonl" and piece.stop < piece.source.size and shard not in counts
    ]


class _RowNumbers:
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


def _processes(options: WindowOptions, size: int) -> int:
    """How many processes cut `size` bytes of sources: as asked, or one a core, but none for less than a few seconds."""
    if options.cut_workers is not None:
        return options.cut_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, size // _BYTES_EACH)


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
    """Turns rows into windows and keeps these in files; loads the tokenizer at the first row of text."""

    def __init__(self, model: ModelOptions, options: WindowOptions) -> None:
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

    @cached_property
    def tokenizer(self) -> WindowTokenizer:
        return load_tokenizer(self.model.model or "embedded", self.model.revision, self.model.trust_remote_code)

    @cached_property
    def length(self) -> int:
        """Tokens in a window of text: as asked, or the papers' 32,768, or what the calculator supports."""
        if self.options.window is not None:
            return self.options.window
        from longsift.calculators.checkpoint import locate
        from longsift.calculators.interface import read_config

        location = locate(self.model.model or "embedded", self.model.revision)
        config = read_config(location, trust_remote_code=self.model.trust_remote_code)
        return min(DEFAULT_WINDOW, getattr(config, "max_position_embeddings", None) or DEFAULT_WINDOW)

    def keep(
        self,
        rows: Iterable[Window | TooShort | BadRow],
        place: Place,
        windows: _Parts[Window],
        quarantine: _Parts[BadRow],
        progress: Progress,
        mark: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Write what became of one piece into its parts; returns what was counted.

        Args:
            rows: of the piece, from its row `place.rows` on.
            place: how far an earlier process came.
            mark: writes how far this one has come.

        Raises:
            InputError: the file could not be read, or not to its end.
        """
        started = time.perf_counter()
        tally = Tally(
            **{name: place.record.get(name, 0) for name in _COUNTS},
            bad_rows=Counter(place.record.get("reasons", {})),
        )
        windows.number, quarantine.number = place.windows, place.quarantine
        tokens = 0
        unread: _Unread | None = None

        def record() -> dict[str, Any]:
            counts = {name: getattr(tally, name) for name in _COUNTS}
            seconds = place.record.get("seconds", 0.0) + time.perf_counter() - started
            about = {key: value or place.record.get(key) for key, value in self._describe().items()}
            return {
                **counts,
                "bad_rows": tally.bad_rows.total(),
                "reasons": dict(tally.bad_rows),
                "seconds": round(seconds, 3),
                **about,
            }

        for row in islice(rows, place.row_windows, None):
            tally.add(row)
            if isinstance(row, _Unread):
                unread = row  # the last, but rows have to be used up
            elif isinstance(row, BadRow):
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
                    mark(dataclasses.asdict(reached))
        if unread is not None:
            raise InputError(unread.reason)
        windows.end()
        quarantine.end()
        return record()

    def windows(self, rows: Iterable[Document | BadRow]) -> Iterator[Window | TooShort | BadRow]:
        # Rows that carry ids need no tokenizer, so one is loaded only where a row of text comes.
        for needed, run in groupby(rows, is_text):
            tokenizer, length = (self.tokenizer, self.length) if needed else (None, None)
            yield from cut_windows(run, tokenizer, length)

    def _describe(self) -> dict[str, Any]:
        """The tokenizer's fingerprint and the window length; null while no row was text."""
        used = "tokenizer" in self.__dict__
        return {"tokenizer": self.tokenizer.fingerprint if used else None, "length": self.length if used else None}


class _Unread(BadRow):
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
            if _part_number(path) >= self.number:
                path.unlink(missing_ok=True)


def _parts(folder: Path) -> dict[str, list[Path]]:
    """The parts that are there by their shards, in order; the folder is listed once for all."""
    parts: dict[str, list[Path]] = {}
    for path in parquet_files(folder):
        parts.setdefault(path.stem.rpartition("-")[0], []).append(path)
    return parts


def _part_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _quarantine_table(rows: list[BadRow]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=QUARANTINE)


def load_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> WindowTokenizer:
    from longsift.calculators.checkpoint import locate

    location = locate(model, revision)
    return WindowTokenizer.load(location.pretrained, location.revision, trust_remote_code)


def first_documents(rows: Iterable[Document | BadRow], limit: int) -> Iterator[Document | BadRow]:
    left = limit
    if left <= 0:
        return
    for row in rows:
        yield row
        left -= isinstance(row, Document)
        if left == 0:
            return


def _keep_sample(folder: RunFolder, size: int, seed: int) -> None:
    """Drop the windows that are not in the sample; whoever cut them kept those that might be."""
    sample = BottomK(size)
    files = parquet_files(folder.windows)
    for path in files:
        for window_id in pq.read_table(path, columns=["window_id"])["window_id"].to_pylist():
            sample.offer(sample_key(window_id, seed))
    threshold = sample.threshold or 0
    for path in files:
        table = pq.read_table(path)
        kept = [sample_key(window_id, seed) <= threshold for window_id in table["window_id"].to_pylist()]
        if not any(kept):
            path.unlink()
        else:  # also where all are kept: read and written once more, they are other bytes
            with publish(path) as temporary:
                pq.write_table(table.filter(pa.array(kept)), temporary, compression="zstd")


def _sum_counts(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    records = list(records)
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    names = ("documents", "bad_rows", "too_short", "too_short_tokens", "windows", "tokens")
    return {name: sum(record[name] for record in records) for name in names} | {"reasons": dict(reasons.most_common())}


def _count_sample(folder: RunFolder) -> dict[str, int]:
    lengths = [pq.read_table(path, columns=["n_tokens"])["n_tokens"] for path in parquet_files(folder.windows)]
    return {"windows": sum(map(len, lengths)), "tokens": sum(sum(length.to_pylist()) for length in lengths)}
