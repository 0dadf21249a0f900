"""Reading documents: JSON lines, Parquet and Hugging Face datasets, on any file system that fsspec knows.

One row of a source becomes one `Document` or one `BadRow`: no row is dropped in silence, and a bad row never
takes a good one with it. Memory holds one line, a few Parquet rows or one Arrow record batch. What the storage
does wrong (a file that is gone, forbidden, or no longer what was listed) is no bad row but an `InputError`: the
file is to be read again.
"""

from __future__ import annotations

import base64
import json
import math
import reprlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from longsift.errors import InputError
from longsift.sources import Source, cause, failure, find_sources

__all__ = ["BadRow", "Document", "ReadOptions", "Source", "excerpt", "find_sources", "read_documents"]

_READ_BYTES = 1 << 20
# Fed to a decompressor at once. Small, because what it decodes from a piece is lost where it meets damage,
# and because a piece of zstd can grow 32,000-fold. Measured to be as fast as larger ones.
_PIECE_BYTES = 4096
_PARQUET_ROWS = 16
_EXCERPT_CHARS = 200
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows become documents.

    Attributes:
        text_key: column of the text. As in the two below, a dotted path such as `meta.body` reaches into
            objects, unless a column has that very name.
        id_key: column of the id, a string or an integer.
        group_by: column of the group; None takes `source` where it is a string, and else the group "all".
        tab_ids: JSON lines are `id<TAB>{json}`.
        max_document_bytes: longer rows are bad rows; lines are skipped without being held in memory. A line takes
            about 20 times its bytes while it is parsed and tokenised.
    """

    text_key: str = "text"
    id_key: str = "id"
    group_by: str | None = None
    tab_ids: bool = False
    max_document_bytes: int = 1 << 25


@dataclass(slots=True)
class Document:
    """One row: a text, or the token ids that it was given as.

    Attributes:
        doc_id: the row's own id, or `<source name>:<row>`.
        text: not blank, without lone surrogates and NUL; None only where `input_ids` is given without text.
        input_ids: (n,) int32, n ≥ 1; None for a row of text.
        group: the category within which scores are compared.
        metadata: the other columns, as values that `json.dumps` writes as valid JSON.
        file, row: url of the source, and 0-based line or row in it.
    """

    doc_id: str
    text: str | None
    input_ids: npt.NDArray[np.int32] | None
    group: str
    metadata: dict[str, Any]
    file: str
    row: int


@dataclass(slots=True)
class BadRow:
    """A row that is no document, or the part of a file that could not be read.

    Attributes:
        file: url of the source.
        row: 0-based line or row; None when the whole file is meant.
        reason: short, and the same for every row with that fault.
        excerpt: first characters of the row, or what exactly failed, as printable ASCII.
    """

    file: str
    row: int | None
    reason: str
    excerpt: str


# --- reading ---


class _Reject(Exception):
    """A row is no document; its text is the reason."""


class _Damaged(Exception):
    """A compressed stream ends too early or is corrupt; its text is the reason."""


def read_documents(
    source: Source, options: ReadOptions, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Document | BadRow]:
    """Read one source, row by row, in order.

    Args:
        source: a file that `find_sources` found.
        options: how rows become documents.
        on_bytes: called with the number of raw (compressed) bytes read since its last call.

    Yields:
        A `Document` or a `BadRow` for each row; a blank line gives nothing but counts as a row. Damage inside
        a file (a truncated stream, a corrupt row group) gives one `BadRow`, after all rows before it.

    Raises:
        InputError: the file cannot be opened, the storage fails while it is read, or it gives fewer or more bytes
            than it had when it was found.
    """
    try:
        fs, path = fsspec.core.url_to_fs(source.address)
        raw = fs.open(path, "rb")
    except Exception as error:  # each file system has its own exceptions
        raise InputError(f"cannot open {source.url}: {failure(error, source.address)}") from cause(
            error, source.address
        )
    with raw:
        file = _CountedFile(raw, source, on_bytes or (lambda count: None))
        read = {"parquet": _parquet_rows, "arrow": _arrow_rows}.get(source.format, _json_rows)
        yield from read(file, source, options)


class _CountedFile:
    """A raw file that reports the bytes it gives, and whose failures cannot be taken for a damaged file."""

    closed = False

    def __init__(self, raw: BinaryIO, source: Source, on_bytes: Callable[[int], None]) -> None:
        self._raw, self._source, self._on_bytes = raw, source, on_bytes
        self.seek, self.tell = raw.seek, raw.tell

    def read(self, size: int = -1) -> bytes:
        try:
            # A damaged file may have pyarrow ask for more than it has, or than memory has.
            data = self._raw.read(min(size, max(self._source.size, 1)))
        except Exception as error:  # each file system has its own exceptions
            what = failure(error, self._source.address)
            raise InputError(f"reading {self._source.url} failed: {what}") from cause(error, self._source.address)
        self._on_bytes(len(data))
        return data

    def chunks(self) -> Iterator[bytes]:
        """All of it, from here to its end, which has to be where it was when the file was found."""
        size = 0
        while chunk := self.read(_READ_BYTES):
            size += len(chunk)
            yield chunk
        if size != self._source.size:
            raise InputError(
                f"{self._source.url} changed: it had {self._source.size:,} bytes when the run began, and {size:,} "
                "when it was read. Run again with --overwrite once it is whole."
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Left to the owner of the raw file; pyarrow asks for it."""


# --- JSON lines ---


class _Decompressor(Protocol):
    """What `zlib.decompressobj()` and `zstandard`'s have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _json_rows(file: _CountedFile, source: Source, options: ReadOptions) -> Iterator[Document | BadRow]:
    chunks = file.chunks()
    if source.format == "jsonl.gz":
        # Zero bytes may pad a gzip file after its end (readers accept them); a file of zeros alone is a lost one.
        chunks = _decompressed(chunks, lambda: zlib.decompressobj(wbits=31), "gzip", padding=b"\0")
    elif source.format == "jsonl.zst":
        # Corpora are often packed with --long=31, which needs a 2 GiB window.
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        chunks = _decompressed(chunks, decoder.decompressobj, "zstd", padding=b"")
    row = -1
    try:
        for row, (line, whole) in enumerate(_lines(chunks, options.max_document_bytes)):
            if row == 0:
                line = line.removeprefix(_BOM)
            if not whole:
                yield BadRow(source.url, row, _too_long(options), excerpt(line))
            elif line and not line.isspace():
                try:
                    yield _document(_json_object(line, options), source, row, options)
                except _Reject as fault:
                    yield BadRow(source.url, row, str(fault), excerpt(line))
                except RecursionError:
                    yield BadRow(source.url, row, "JSON nested too deeply", excerpt(line))
    except _Damaged as damage:
        yield BadRow(source.url, row + 1, str(damage), excerpt(str(damage.__cause__ or damage)))


def _decompressed(
    chunks: Iterator[bytes], new: Callable[[], _Decompressor], kind: str, padding: bytes
) -> Iterator[bytes]:
    """The content of all gzip members or zstd frames of a file, one after the other; padding may follow the first."""
    decoder: _Decompressor | None = None
    allowed = b""
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            piece = chunk[start : start + _PIECE_BYTES]
            while piece:
                if decoder is None:
                    piece = piece.lstrip(allowed)
                    if not piece:
                        break
                    decoder = new()
                try:
                    content = decoder.decompress(piece)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise _Damaged(f"corrupt {kind} stream") from error
                piece = decoder.unused_data
                if decoder.eof:
                    decoder, allowed = None, padding
                if content:
                    yield content
    if decoder is not None:
        raise _Damaged(f"truncated {kind} stream")


def _lines(chunks: Iterator[bytes], limit: int) -> Iterator[tuple[bytearray, bool]]:
    """Lines without their newline, and whether each is whole: of one over `limit` bytes the start is kept."""
    line, size = bytearray(), 0
    for chunk in chunks:
        for index, part in enumerate(chunk.split(b"\n")):
            if index > 0:
                yield line, size <= limit
                line, size = bytearray(), 0
            size += len(part)
            line += part
            if size > limit:
                del line[4 * _EXCERPT_CHARS :]
    if size:
        yield line, size <= limit


def _json_object(line: bytearray, options: ReadOptions) -> dict[str, Any]:
    try:
        # json.loads(bytes) would guess UTF-16 and let surrogates through.
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise _Reject("invalid UTF-8") from None
    tab_id = None
    if options.tab_ids:
        tab_id, tab, text = text.partition("\t")
        if not tab:
            raise _Reject("no tab between id and JSON")
    try:
        row = json.loads(text)
    except ValueError:
        raise _Reject("broken JSON") from None
    if not isinstance(row, dict):
        raise _Reject("not a JSON object")
    if tab_id is not None:
        row[options.id_key] = tab_id
    return row


# --- Parquet and Arrow ---

# What pyarrow raises for damaged files; failures of the storage itself are InputErrors (see _CountedFile).
_ARROW_ERRORS = (pa.ArrowException, OSError)


def _parquet_rows(file: _CountedFile, source: Source, options: ReadOptions) -> Iterator[Document | BadRow]:
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        names = schema.names
    except (*_ARROW_ERRORS, UnicodeDecodeError) as error:
        yield BadRow(source.url, None, "unreadable parquet file", excerpt(str(error)))
        return
    sizes = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
    if not ({_column(options.text_key, schema), "input_ids"} & set(names)):
        # No need to decode anything to say the same of every row.
        fault, columns = _missing("text", options.text_key), excerpt("columns: " + ", ".join(names))
        yield from (BadRow(source.url, row, fault, columns) for row in range(sum(sizes)))
        return
    start = 0
    for index, size in enumerate(sizes):
        row, fault = start, "it ends too early"
        try:
            # Without pyarrow's threads, which would call on_bytes: files are read in parallel by processes.
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[index], use_threads=False):
                yield from _batch_rows(batch, row, source, options)
                row += batch.num_rows
        except _ARROW_ERRORS as error:
            fault = str(error)
        start += size
        if row < start:  # with damaged pages, pyarrow may also end without an error
            lost = f"rows {row} to {start - 1} are lost: {fault}"
            yield BadRow(source.url, row, "corrupt parquet row group", excerpt(lost))


def _arrow_rows(file: _CountedFile, source: Source, options: ReadOptions) -> Iterator[Document | BadRow]:
    try:
        batches = pa.ipc.open_stream(pa.PythonFile(file, mode="r"))
        _ = batches.schema.names
    except (*_ARROW_ERRORS, UnicodeDecodeError) as error:
        yield BadRow(source.url, None, "unreadable arrow file", excerpt(str(error)))
        return
    row = 0
    try:
        for batch in batches:
            _check_batch(batch)
            yield from _batch_rows(batch, row, source, options)
            row += batch.num_rows
    except _ARROW_ERRORS as error:
        yield BadRow(source.url, row, "corrupt arrow stream", excerpt(str(error)))


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
                raise _Reject(_too_long(options))
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                row[name] = _python_value(name, column[index])
            yield _document(row, source, first + index, options)
        except _Reject as fault:
            yield BadRow(source.url, first + index, str(fault), excerpt(reprlib.repr(row)))


def _python_value(name: str, value: pa.Scalar) -> Any:
    if name == "input_ids" and isinstance(value, pa.ListScalar) and value.is_valid:
        ids = value.values
        if pa.types.is_integer(ids.type) and not ids.null_count:
            return ids.to_numpy(zero_copy_only=False)  # a list of a million Python integers is slow
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise _Reject("invalid UTF-8") from None
    except (ValueError, OverflowError):
        raise _Reject(f"column {name!r} holds a value that Python cannot hold") from None


def _column(path: str, schema: pa.Schema) -> str:
    return path if path in schema.names else path.partition(".")[0]


# --- a row becomes a document ---

_ABSENT = object()


def _document(row: dict[str, Any], source: Source, number: int, options: ReadOptions) -> Document:
    """Check one row. Raises `_Reject` with the reason when it is no document."""
    rest = dict(row)
    text = _take(rest, options.text_key)
    given_id = _take(rest, options.id_key)
    ids = rest.pop("input_ids", None)
    input_ids = None if ids is None else _token_ids(ids)
    if input_ids is not None and text in (_ABSENT, None, ""):
        text = None
    else:
        _check_text(text, options.text_key)
    return Document(
        doc_id=_doc_id(given_id, f"{source.name}:{number}"),
        text=text,
        input_ids=input_ids,
        group=_group(row, options.group_by),
        metadata={_json_value(key): _json_value(value) for key, value in rest.items()},
        file=source.url,
        row=number,
    )


def _too_long(options: ReadOptions) -> str:
    return f"longer than {options.max_document_bytes:,} bytes"


def _missing(what: str, key: str) -> str:
    return f"missing {what} key {key!r}"


def _take(row: dict[str, Any], path: str) -> Any:
    """Remove and return the value at a path; objects on the way are copied, not changed."""
    if path in row:
        return row.pop(path)
    head, _, tail = path.partition(".")
    if not tail or not isinstance(row.get(head), dict):
        return _ABSENT
    row[head] = dict(row[head])
    return _take(row[head], tail)


def _check_text(text: object, key: str) -> None:
    if text is _ABSENT:
        raise _Reject(_missing("text", key))
    if text is None:
        raise _Reject("text is null")
    if not isinstance(text, str):
        raise _Reject("text is not a string")
    if not text or text.isspace():
        raise _Reject("text is empty")
    if "\0" in text:
        raise _Reject("text holds a NUL character")
    if not _is_unicode(text):
        raise _Reject("text holds a lone surrogate")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can smuggle in lone surrogates, such as "\\ud800"."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _token_ids(values: Any) -> npt.NDArray[np.int32]:
    if not isinstance(values, list | np.ndarray):
        raise _Reject("input_ids is not a list")
    if len(values) == 0:
        raise _Reject("input_ids is empty")
    if isinstance(values, list) and set(map(type, values)) != {int}:
        raise _Reject("input_ids holds something other than integers")
    # numpy's own min and max would turn Python integers beyond 64 bits into an error.
    lowest, highest = (min(values), max(values)) if isinstance(values, list) else (values.min(), values.max())
    if lowest < 0 or highest >= 1 << 31:
        raise _Reject("input_ids holds an integer below 0 or above 2147483647")
    return np.array(values, dtype=np.int32)


def _doc_id(value: object, default: str) -> str:
    if value is _ABSENT or value is None or value == "":
        return default
    return _name(value, "id")


def _group(row: dict[str, Any], key: str | None) -> str:
    if key is None:
        source = row.get("source")
        return _name(source, "group") if isinstance(source, str) and source else "all"
    value = _take(dict(row), key)
    if value is _ABSENT or value is None or value == "":
        raise _Reject(_missing("group", key))
    return _name(value, "group")


def _name(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Reject(f"{what} is neither a string nor an integer")
    if not _is_unicode(name := str(value)):
        raise _Reject(f"{what} holds a lone surrogate")
    return name


def _json_value(value: Any) -> Any:
    """The value as `json.dumps` can write it in valid JSON: NaN as null, dates as text, bytes in base64."""
    match value:
        case str():
            return value if _is_unicode(value) else value.encode("utf-8", "replace").decode("utf-8")
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {_json_value(str(key)): _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case _:
            return str(value)


def excerpt(content: str | bytearray) -> str:
    """The first characters, escaped to printable ASCII."""
    if isinstance(content, bytearray):
        content = content[: 4 * _EXCERPT_CHARS].decode("utf-8", "surrogateescape")
    return content[:_EXCERPT_CHARS].encode("unicode_escape").decode("ascii")
