"""The windows stage: source files become parts of the windows table, in order, resumable after every part.

A stopped source is read again up to the row that its last part ended in, which takes little next to tokenising: the
same for every format, also for those that cannot be entered in the middle.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.documents import BadRow, Document, ReadOptions, read_documents
from longsift.engines.cutters import Cutters
from longsift.errors import InputError
from longsift.options import ModelOptions, WindowOptions
from longsift.progress import Progress
from longsift.shards import RunFolder
from longsift.sources import Source, find_sources
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
) -> dict[str, Any]:
    """Read documents and cut them into windows of token ids, one source file at a time.

    Args:
        inputs: files, folders, globs or urls (see `longsift.documents.find_sources`).
        out: folder of the run.

    Returns:
        Counts: documents, bad_rows, too_short, windows, tokens.

    Raises:
        InputError: nothing to read, or a source that cannot be opened.
        OutputError: the folder holds windows of another run.
    """
    sources = find_sources(inputs)
    folder = RunFolder(out)
    with folder.lock():
        return cut_sources(sources, folder, model, options, overwrite=overwrite, quiet=quiet)


def cut_sources(
    sources: Sequence[Source],
    folder: RunFolder,
    model: ModelOptions,
    options: WindowOptions,
    *,
    overwrite: bool,
    quiet: bool,
    on_part: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Do as `cut` in a run folder whose lock is held.

    A source that cannot be read does not stop the others: it is tried again when the run goes on, from where it failed.

    Args:
        on_part: called for every file of the windows table, those of an earlier process too, when it is there.
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
    }
    if folder.begin("windows", identity, overwrite=overwrite):
        return dict(folder.section("windows")["counts"])
    done = folder.records("windows")
    begun = {shard: Place(**content) for shard, content in folder.places().items()}
    cutter = Cutter(model, options)
    left: list[tuple[str, Source, Place]] = []
    written, quarantined = _parts_by_source(folder.windows), _parts_by_source(folder.quarantine)
    for number, source in enumerate(sources):
        shard = f"{number:05d}"
        parts = written.get(shard, [])
        if shard not in done:
            place = begun.get(shard, Place())
            left.append((shard, source, place))
            # What was written after the last place was marked is cut anew.
            for leftover in (*parts[place.parts :], *quarantined.get(shard, [])[place.quarantined :]):
                leftover.unlink()
            parts = parts[: place.parts]
        for path in parts:
            on_part(path)
            if cutter.sample is not None:
                for window_id in pq.read_table(path, columns=["window_id"])["window_id"].to_pylist():
                    cutter.sample.offer(sample_key(window_id, options.seed))
    total, bytes_left = (sum(source.size for source in some) for some in (sources, (source for _, source, _ in left)))
    with Progress("windows", total, "bytes", done=total - bytes_left, quiet=quiet) as progress, ExitStack() as stack:

        def rows() -> Iterator[Iterator[Document | BadRow]]:
            for _, source, place in left:
                documents = read_documents(source, cutter.read, progress.advance)
                if options.limit is None:
                    documents = _as_far_as_it_goes(documents, source)
                else:
                    documents = first_documents(documents, options.limit - sum(r["documents"] for r in done.values()))
                yield islice(documents, place.rows, None)

        processes = _processes(options, bytes_left)
        cut_rows: Iterator[Iterator[Window | TooShort | BadRow]]
        if processes > 1:
            cutters = stack.enter_context(Cutters(processes, lambda: (cutter.tokenizer, cutter.length)))
            # With a limit, what is read of a source depends on how many documents those before it had.
            together = [rows()] if options.limit is None else ([some] for some in rows())
            cut_rows = chain.from_iterable(map(cutters.cut_each, together))
        else:
            cut_rows = map(cutter.windows, rows())
        unread: list[InputError] = []
        for (shard, _, place), cut in zip(left, cut_rows, strict=True):
            try:
                done[shard] = cutter.keep(cut, shard, place, folder, progress, on_part)
            except InputError as error:
                unread.append(error)
            else:
                folder.record("windows", shard, done[shard])
    if unread:
        raise InputError(
            f"{len(unread):,} of {len(sources):,} files could not be read; all others were cut. The same command tries "
            "them again. " + "; ".join(map(str, unread[:_NAMED])) + ("; …" if len(unread) > _NAMED else "")
        )
    if cutter.sample is not None:
        _keep_sample(folder, cutter.sample.threshold, options.seed)
    counts = _sum_counts(done.values())
    if cutter.sample is not None:
        counts |= {"windows_before_sample": counts["windows"], **_count_sample(folder)}
    seconds = sum(record["seconds"] for record in done.values())
    # A source that an earlier process cut may be the one that had text.
    text = {key: next((r[key] for r in done.values() if r[key] is not None), None) for key in ("tokenizer", "length")}
    folder.finish("windows", {"counts": counts, "seconds": seconds, **text})
    return counts


def _processes(options: WindowOptions, size: int) -> int:
    """How many processes cut `size` bytes of sources: as asked, or one a core, but none for less than a few seconds."""
    if options.cut_workers is not None:
        return options.cut_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, size // _BYTES_EACH)


@dataclass(frozen=True)
class Place:
    """How far a source was cut when a part of its windows was written.

    Attributes:
        rows: documents and bad rows before the one that its last window is of.
        windows: of that one, which are written.
        parts, quarantined: files of windows and of the quarantine that are written.
        record: what was counted so far, as in the record of a finished source.
    """

    rows: int = 0
    windows: int = 0
    parts: int = 0
    quarantined: int = 0
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
        shard: str,
        place: Place,
        folder: RunFolder,
        progress: Progress,
        on_part: Callable[[Path], None],
    ) -> dict[str, Any]:
        """Write what became of one source into the parts `<shard>-<part>.parquet`; returns what was counted.

        Args:
            rows: of the source, from the row `place.rows` on.
            place: how far an earlier process came.

        Raises:
            InputError: the source could not be read, or not to its end.
        """
        started = time.perf_counter()
        tally = Tally(
            **{name: place.record.get(name, 0) for name in _COUNTS},
            bad_rows=Counter(place.record.get("reasons", {})),
        )
        windows = _Parts(folder.windows, shard, windows_table, on_part, place.parts)
        quarantine = _Parts(folder.quarantine, shard, _quarantine_table, written=place.quarantined)
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

        for row in islice(rows, place.windows, None):
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
                        reached = Place(before, row.index + 1, windows.written, quarantine.written, record())
                        folder.mark_place(shard, dataclasses.asdict(reached))
        if unread is not None:
            raise InputError(unread.reason)
        windows.write()
        quarantine.write()
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


def _as_far_as_it_goes(rows: Iterable[Document | BadRow], source: Source) -> Iterator[Document | BadRow]:
    try:
        yield from rows
    except InputError as error:
        yield _Unread(source.url, None, str(error), "")


@dataclass
class _Parts(Generic[Row]):
    """Rows of one shard that are written a file at a time, `<shard>-<part>.parquet`."""

    folder: Path
    shard: str
    as_table: Callable[[list[Row]], pa.Table]
    on_part: Callable[[Path], None] = lambda path: None
    written: int = 0
    held: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.held.append(row)

    def write(self) -> None:
        if self.held:
            path = self.folder / f"{self.shard}-{self.written:05d}.parquet"
            with publish(path) as temporary:
                pq.write_table(self.as_table(self.held), temporary, compression="zstd")
            self.held, self.written = [], self.written + 1
            self.on_part(path)


def _parts_by_source(folder: Path) -> dict[str, list[Path]]:
    """The parts that are there, in order; the folder is listed once for all sources."""
    parts: dict[str, list[Path]] = {}
    for path in parquet_files(folder):
        parts.setdefault(path.stem.partition("-")[0], []).append(path)
    return parts


def _quarantine_table(rows: list[BadRow]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=QUARANTINE)


def load_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> WindowTokenizer:
    from longsift.calculators.checkpoint import locate

    location = locate(model, revision)
    return WindowTokenizer.load(location.pretrained, location.revision, trust_remote_code)


def first_documents(rows: Iterable[Document | BadRow], limit: int) -> Iterator[Document | BadRow]:
    left = limit
    for row in rows:
        if left == 0:
            return
        left -= isinstance(row, Document)
        yield row


def _keep_sample(folder: RunFolder, threshold: int | None, seed: int) -> None:
    """Drop the windows that are not in the sample; each source kept those that might be."""
    if threshold is None:
        return
    for path in parquet_files(folder.windows):
        table = pq.read_table(path)
        kept = [sample_key(window_id, seed) <= threshold for window_id in table["window_id"].to_pylist()]
        if not any(kept):
            path.unlink()
        elif not all(kept):
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
