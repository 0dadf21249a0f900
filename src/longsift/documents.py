"""Reading documents: JSON lines, Parquet and Hugging Face datasets, on any file system that fsspec knows.

One row of a source becomes one `Document` or one `BadRow`: no row is dropped in silence, and a bad row never
takes a good one with it. Memory holds one line or a few rows of columns. What the storage does wrong (a file that
is gone, forbidden, or no longer what was listed) is no bad row but an `InputError`: the file is to be read again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import zstandard

from longsift.columnar import arrow_rows, parquet_rows
from longsift.rows import EXCERPT_BYTES, BadRow, Document, ReadOptions, Reject, document_of, excerpt, too_long
from longsift.sources import Piece, Source, SourceFile, find_sources, open_piece

__all__ = [
    "BadRow",
    "Document",
    "ReadOptions",
    "Source",
    "count_lines",
    "excerpt",
    "find_sources",
    "read_documents",
    "read_piece",
]

# Fed to a decompressor at once. Small, because what it decodes from a piece is lost where it meets damage,
# and because a piece of zstd can grow 32,000-fold. Measured to be as fast as larger ones.
_FED_BYTES = 4096
_BOM = b"\xef\xbb\xbf"


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
    return read_piece(Piece(source, 0, source.size), 0, options, on_bytes)


def read_piece(
    piece: Piece, first: int, options: ReadOptions, on_bytes: Callable[[int], None] | None = None
) -> Generator[Document | BadRow, None, int]:
    """Read the rows of one piece of a source; all pieces together give what `read_documents` gives.

    Args:
        first: of JSON lines, the number of the piece's first row, which are the lines before it (`count_lines`). A
            Parquet file tells by itself.

    Returns:
        The number of the row after the last.

    Raises:
        InputError: as `read_documents`; or a file of which this is a part is not the one that was found.
    """
    with open_piece(piece, on_bytes or (lambda count: None)) as file:
        match piece.source.format:
            case "parquet":
                return (yield from parquet_rows(file, piece, options))
            case "arrow":
                return (yield from arrow_rows(file, piece.source, options))
            case _:
                return (yield from _json_rows(file, piece, first, options))


def count_lines(piece: Piece) -> int:
    """How many lines begin in a piece of a file of plain JSON lines that is not its last.

    Raises:
        InputError: as `read_piece`.
    """
    with open_piece(piece) as file:
        # A line begins at the start of the file, and after each newline.
        return (piece.start == 0) + sum(chunk.count(b"\n") for chunk in file.between(piece.start - 1, piece.stop - 1))


# --- JSON lines ---


class _Decompressor(Protocol):
    """What `zlib.decompressobj()` and `zstandard`'s have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _json_rows(
    file: SourceFile, piece: Piece, first: int, options: ReadOptions
) -> Generator[Document | BadRow, None, int]:
    source = piece.source
    if source.format == "jsonl.gz":
        # Zero bytes may pad a gzip file after its end (readers accept them); a file of zeros alone is a lost one.
        chunks = _decompressed(file.between(0), lambda: zlib.decompressobj(wbits=31), "gzip", padding=b"\0")
    elif source.format == "jsonl.zst":
        # Corpora are often packed with --long=31, which needs a 2 GiB window.
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        chunks = _decompressed(file.between(0), decoder.decompressobj, "zstd", padding=b"")
    else:
        chunks = file.lines(piece)
    row = first
    try:
        for line, whole in _lines(chunks, options.max_document_bytes):
            if row == 0:
                line = line.removeprefix(_BOM)
            if not whole:
                yield BadRow(source.url, row, too_long(options), excerpt(line))
            elif line and not line.isspace():
                try:
                    yield document_of(_json_object(line, options), source, row, options)
                except Reject as fault:
                    yield BadRow(source.url, row, str(fault), excerpt(line))
                except RecursionError:
                    yield BadRow(source.url, row, "JSON nested too deeply", excerpt(line))
            row += 1
    except _Damaged as damage:
        yield BadRow(source.url, row, str(damage), excerpt(str(damage.__cause__ or damage)))
    return row


def _decompressed(
    chunks: Iterator[bytes], new: Callable[[], _Decompressor], kind: str, padding: bytes
) -> Iterator[bytes]:
    """The content of all gzip members or zstd frames of a file, one after the other; padding may follow the first."""
    decoder: _Decompressor | None = None
    allowed = b""
    for chunk in chunks:
        for start in range(0, len(chunk), _FED_BYTES):
            piece = chunk[start : start + _FED_BYTES]
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
                del line[EXCERPT_BYTES:]
    if size:
        yield line, size <= limit


def _json_object(line: bytearray, options: ReadOptions) -> dict[str, Any]:
    try:
        # json.loads(bytes) would guess UTF-16 and let surrogates through.
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise Reject("invalid UTF-8") from None
    tab_id = None
    if options.tab_ids:
        tab_id, tab, text = text.partition("\t")
        if not tab:
            raise Reject("no tab between id and JSON")
    try:
        row = json.loads(text)
    except ValueError:
        raise Reject("broken JSON") from None
    if not isinstance(row, dict):
        raise Reject("not a JSON object")
    if tab_id is not None:
        row[options.id_key] = tab_id
    return row
