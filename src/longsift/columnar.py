"""Parquet and Arrow: rows of columns become documents, a few at a time.

Memory is bounded however large row groups, pages and batches are: what pyarrow would hold whole is read by `pages` and
`bodies` where it is large, with the same rows for a result.
"""

from __future__ import annotations

import reprlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.bodies import ArrowStream, is_bytes
from longsift.pages import BadPage, page_headers, readable, strings
from longsift.rows import BadRow, Document, ReadOptions, Reject, document_of, excerpt, missing, too_long
from longsift.sources import Piece, Source, SourceFile

_PARQUET_ROWS = 16
# pyarrow holds up to four times the bytes of a page: as it is in the file, decompressed, its dictionary, and its rows.
_PAGE_BYTES = 1 << 27  # larger pages are read piece by piece
_HELD_BYTES = 1 << 28  # of pages that cannot be, in all columns together
# Columns of smaller row groups (compressed) are read at once. Of others, pyarrow reads one column a bit and then
# another; smaller bits would have caches of remote files fetch more than is used.
_GROUP_BYTES = 1 << 28
_READ_BYTES = 1 << 24
# What pyarrow raises for damaged files; failures of the storage itself are InputErrors (see SourceFile).
_ARROW_ERRORS = (pa.ArrowException, OSError)


def parquet_rows(file: SourceFile, piece: Piece, options: ReadOptions) -> Generator[Document | BadRow, None, int]:
    source = piece.source
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        names = schema.names
    except (*_ARROW_ERRORS, UnicodeDecodeError) as error:
        if piece.start == 0:  # once for the file
            yield BadRow(source.url, None, "unreadable parquet file", excerpt(str(error)))
        return 0
    sizes: list[int] = [max(0, table.metadata.row_group(index).num_rows) for index in range(table.num_row_groups)]
    # Not by their own places, which a damaged file may give twice or out of its range.
    groups = [i for i in range(len(sizes)) if piece.start <= i * source.size // len(sizes) < piece.stop]
    start = sum(sizes[: groups[0]]) if groups else 0
    if not ({_column(options.text_key, schema), "input_ids"} & set(names)):
        # No need to decode anything to say the same of every row.
        fault, columns = missing("text", options.text_key), excerpt("columns: " + ", ".join(names))
        stop = start + sum(sizes[index] for index in groups)
        yield from (BadRow(source.url, row, fault, columns) for row in range(start, stop))
        return stop
    for index in groups:
        row, reason, fault = start, "corrupt parquet row group", "it ends too early"
        try:
            # A damaged one may hold more rows than it says; numbers of rows are as it says.
            for made in islice(_group_rows(file, table, index, row, source, options), sizes[index]):
                yield made
                row += 1
        except _TooLarge as error:
            reason, fault = "parquet pages too large", str(error)
        except (*_ARROW_ERRORS, BadPage) as error:
            fault = str(error)
        start += sizes[index]
        if row < start:  # with damaged pages, pyarrow may also end without an error
            lost = f"rows {row} to {start - 1} are lost: {fault}"
            yield BadRow(source.url, row, reason, excerpt(lost))
    return start


class _TooLarge(Exception):
    """A row group takes more memory than it may; its text says of what, and how to write it again."""


def _group_rows(
    file: SourceFile, table: pq.ParquetFile, index: int, row: int, source: Source, options: ReadOptions
) -> Iterator[Document | BadRow]:
    """The rows of a row group, of which `row` is the first."""
    group = table.metadata.row_group(index)
    columns = _columns(file, table, index) if group.total_byte_size > _PAGE_BYTES else []
    if sum(column.total_compressed_size for column in columns) > _GROUP_BYTES:
        table = pq.ParquetFile(file, metadata=table.metadata, buffer_size=_READ_BYTES, pre_buffer=False)
    schema = table.schema_arrow
    streamed = _streamed(file, source, table, columns, options)
    others = [name for name in schema.names if name not in streamed] if streamed else None
    # Without pyarrow's threads, which would call on_bytes: files are read in parallel by processes.
    batches = table.iter_batches(_PARQUET_ROWS, row_groups=[index], columns=others, use_threads=False)
    if not streamed:
        for batch in batches:
            yield from _batch_rows(batch, row, source, options)
            row += batch.num_rows
        return
    rest: Iterator[list[pa.Array]] = iter(list, None)
    if others:
        rest = (batch.slice(at, 1).columns for batch in batches for at in range(batch.num_rows))
    texts = zip(*streamed.values(), strict=False)
    for number, values, columns_of_row in zip(range(row, row + group.num_rows), texts, rest, strict=False):
        if any(isinstance(value, int) for value in values):
            size = sum(value for value in values if isinstance(value, int))
            yield BadRow(source.url, number, too_long(options), excerpt(f"{size:,} bytes"))
            continue
        made = dict(zip(streamed, values, strict=True))
        left = iter(columns_of_row)
        arrays = [_one(made[field.name], field.type) if field.name in made else next(left) for field in schema]
        yield from _batch_rows(pa.RecordBatch.from_arrays(arrays, schema.names), number, source, options)


def _streamed(
    file: SourceFile, source: Source, table: pq.ParquetFile, columns: list[Any], options: ReadOptions
) -> dict[str, Iterator[bytes | int | None]]:
    """The values of those columns of a row group that have pages too large for pyarrow, by name.

    Raises:
        _TooLarge: there are such that only pyarrow can read.
    """
    schema = table.schema_arrow
    leaves = [table.schema.column(number) for number in range(len(table.schema))]
    paths = [leaf.path for leaf in leaves]
    streamed: dict[str, Iterator[bytes | int | None]] = {}
    held = 0
    for column, leaf, path in zip(columns, leaves, paths, strict=False):
        if max(column.total_uncompressed_size, column.total_compressed_size) <= _PAGE_BYTES:
            continue
        try:
            pages = page_headers(file, source.size, column)
        except BadPage:
            continue  # pyarrow says what is wrong, or knows more
        largest = max((page.size for page in pages), default=0)
        if largest <= _PAGE_BYTES:
            continue
        nullable = leaf.max_definition_level == 1
        flat = leaf.max_definition_level <= 1 and leaf.max_repetition_level == 0 and "." not in path
        if flat and paths.count(path) == 1 and is_bytes(schema.field(path).type) and readable(pages, column):
            streamed[path] = strings(file, pages, column.compression, nullable, options.max_document_bytes)
            continue
        held += largest
        if held > _HELD_BYTES:
            raise _TooLarge(
                f"a page of the column {path} takes {largest:,} bytes. Write the file with fewer rows in a row group"
            )
    return streamed


def _columns(file: SourceFile, table: pq.ParquetFile, index: int) -> list[Any]:
    """What the file says of the column chunks of a row group.

    pyarrow is first to begin to read each, when it raises what is wrong: to ask it about a damaged one (with an unknown
    codec, say) ends the process.

    Raises:
        pa.ArrowException, OSError: the file says nothing sensible.
    """
    unread = pq.ParquetFile(_Unread(file), metadata=table.metadata, buffer_size=1, pre_buffer=False)
    for number in range(len(table.schema)):
        with suppress(_Reached):
            next(unread.reader.iter_batches(1, [index], column_indices=[number], use_threads=False), None)
    group = table.metadata.row_group(index)
    return [group.column(number) for number in range(len(table.schema))]


class _Reached(Exception):
    """Something would be read."""


class _Unread:
    """A file that cannot be read."""

    closed = False

    def __init__(self, file: SourceFile) -> None:
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        raise _Reached

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None: ...


def _one(value: bytes | None, kind: pa.DataType) -> pa.Array:
    large = kind in (pa.large_string(), pa.large_binary())
    return pa.array([value], pa.large_binary() if large else pa.binary()).view(kind)


def arrow_rows(file: SourceFile, source: Source, options: ReadOptions) -> Generator[Document | BadRow, None, int]:
    stream = ArrowStream(file, source.size)
    try:
        batches = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))
        _ = batches.schema.names
    except (*_ARROW_ERRORS, UnicodeDecodeError) as error:
        yield BadRow(source.url, None, "unreadable arrow file", excerpt(str(error)))
        return 0
    row = 0
    try:
        for batch in batches:
            for part in stream.parts(batch, options.max_document_bytes):
                if isinstance(part, int):
                    yield BadRow(source.url, row, too_long(options), excerpt(f"{part:,} bytes"))
                    row += 1
                else:
                    _check_batch(part)
                    yield from _batch_rows(part, row, source, options)
                    row += part.num_rows
    except _ARROW_ERRORS as error:
        yield BadRow(source.url, row, "corrupt arrow stream", excerpt(str(error)))
    return row


def _check_batch(batch: pa.RecordBatch) -> None:
    """Refuse offsets that point out of their buffers, which Arrow does not look at and follows wherever they lead.

    Raises:
        pa.ArrowInvalid: there are some.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:  # text that is not UTF-8, perhaps: that is for each row to say
        binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        for column in batch.columns:
            column.view(binary.get(column.type, column.type)).validate(full=True)


def _batch_rows(batch: pa.RecordBatch, first: int, source: Source, options: ReadOptions) -> Iterator[Document | BadRow]:
    large = batch.nbytes > options.max_document_bytes
    for index in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            if large and batch.slice(index, 1).nbytes > options.max_document_bytes:
                raise Reject(too_long(options))
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = _python_value(name, column[index])
            yield document_of(row, source, first + index, options)
        except Reject as fault:
            yield BadRow(source.url, first + index, str(fault), excerpt(reprlib.repr(row)))


def _python_value(name: str, value: pa.Scalar) -> Any:
    if name == "input_ids" and isinstance(value, pa.ListScalar) and value.is_valid:
        ids = value.values
        if pa.types.is_integer(ids.type) and not ids.null_count:
            return ids.to_numpy(zero_copy_only=False)  # a list of a million Python integers is slow
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise Reject("invalid UTF-8") from None
    except (ValueError, OverflowError):
        raise Reject(f"column {name!r} holds a value that Python cannot hold") from None


def _column(path: str, schema: pa.Schema) -> str:
    return path if path in schema.names else path.partition(".")[0]
