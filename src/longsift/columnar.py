"""Parquet and Arrow: rows of columns become documents, a few at a time."""

from __future__ import annotations

import reprlib
from collections.abc import Generator, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.rows import BadRow, Document, ReadOptions, Reject, document_of, excerpt, missing, too_long
from longsift.sources import Piece, Source, SourceFile

_PARQUET_ROWS = 16
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
    sizes: list[int] = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
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
        row, fault = start, "it ends too early"
        try:
            # Without pyarrow's threads, which would call on_bytes: files are read in parallel by processes.
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[index], use_threads=False):
                yield from _batch_rows(batch, row, source, options)
                row += batch.num_rows
        except _ARROW_ERRORS as error:
            fault = str(error)
        start += sizes[index]
        if row < start:  # with damaged pages, pyarrow may also end without an error
            lost = f"rows {row} to {start - 1} are lost: {fault}"
            yield BadRow(source.url, row, "corrupt parquet row group", excerpt(lost))
    return start


def arrow_rows(file: SourceFile, source: Source, options: ReadOptions) -> Generator[Document | BadRow, None, int]:
    try:
        batches = pa.ipc.open_stream(pa.PythonFile(file, mode="r"))
        _ = batches.schema.names
    except (*_ARROW_ERRORS, UnicodeDecodeError) as error:
        yield BadRow(source.url, None, "unreadable arrow file", excerpt(str(error)))
        return 0
    row = 0
    try:
        for batch in batches:
            _check_batch(batch)
            yield from _batch_rows(batch, row, source, options)
            row += batch.num_rows
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
