"""The strings of one column of a Parquet row group, one at a time, in bounded memory, however large its pages are.

pyarrow decompresses a page at once and copies rows out of it, and it writes up to 1,024 rows into a page whatever
their size: a page of books is a gigabyte. Here a page is decompressed piece by piece, a string that is too long is
passed over, and a large dictionary is kept in a temporary file. This reads what such writers write, flat columns of
strings or bytes, plain or with a dictionary (see `readable`); all else is pyarrow's.

Format: https://parquet.apache.org/docs/file-format/ and, of snappy,
https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longsift.errors import InputError

__all__ = ["BadPage", "Page", "page_headers", "readable", "strings"]

_PLAIN, _RLE, _DICTIONARY = 0, 3, (2, 8)  # encodings
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd"}
_MOST_VALUES = 1 << 20  # of a page; what is held of each takes some hundred bytes at most
_HEADER_BYTES = (1 << 9, 1 << 13, 1 << 17, 1 << 21)  # tried one after the other: it may hold long statistics
_READ_BYTES = 1 << 18
_SPOOL_BYTES = 1 << 24


class BadPage(Exception):
    """The pages are not as the format has them; its text says in what."""


class File(Protocol):
    """What is needed of `longsift.sources.SourceFile`, in which others may read between two calls."""

    def between(self, start: int, stop: int) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's header says.

    Attributes:
        kind: as in `PageType` of the format.
        start: where its content begins in the file.
        packed, size: bytes of the content, as it is in the file and decompressed.
        values: nulls included; of a dictionary, its entries.
        encoding: of the values.
        levels: bytes before the values that are never compressed; None where the values' own stream begins with them.
        compressed: False where the codec was not used.
    """

    kind: int
    start: int
    packed: int
    size: int
    values: int
    encoding: int
    levels: int | None
    compressed: bool


def page_headers(file: File, size: int, column: Any) -> list[Page]:
    """Read the headers of a column chunk's pages.

    Args:
        size: bytes of the file.
        column: a `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        BadPage: they cannot be read.
        InputError: the storage fails.
    """
    place = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < place:
        place = column.dictionary_page_offset
    end = place + column.total_compressed_size
    if not 0 <= place <= end <= size:
        raise BadPage("a column reaches beyond its file")
    pages: list[Page] = []
    while place < end:
        pages.append(_page(file, place, end))
        place = pages[-1].start + pages[-1].packed
    if place > end:
        raise BadPage("a page reaches beyond its column")
    return pages


def readable(pages: list[Page], column: Any) -> bool:
    """Whether `strings` reads these pages of a flat column of strings."""
    return column.compression in _CODECS and all(
        page.values <= _MOST_VALUES
        and (
            (page.kind == _DICTIONARY_PAGE and index == 0 and page.encoding in (_PLAIN, 2))
            or (page.kind in (_DATA_PAGE, _DATA_PAGE_V2) and page.encoding in (_PLAIN, *_DICTIONARY))
        )
        for index, page in enumerate(pages)
    )


def strings(file: File, pages: list[Page], codec: str, nullable: bool, longest: int) -> Iterator[bytes | int | None]:
    """Read the values of a flat column chunk of strings or bytes, in order.

    Args:
        pages: its pages, for which `readable` holds.
        codec: its `compression`.
        nullable: whether values may be null.
        longest: bytes of a value that are held at most.

    Yields:
        The bytes of each value, None for null, or the size of a value that is too long.

    Raises:
        BadPage: a page is corrupt.
        InputError: the storage fails, or there is no room for a temporary file.
    """
    dictionary: _Dictionary | None = None
    try:
        for page in pages:
            content = _Content(file, page, _CODECS[codec])
            if page.kind == _DICTIONARY_PAGE:
                dictionary = _Dictionary(content.string(longest) for _ in range(page.values))
                continue
            there: npt.NDArray[np.int64] | None = None
            if nullable:
                there = _hybrid(content.levels(), 1, page.values)
            count = page.values if there is None else int(there.sum())
            if page.encoding == _PLAIN:
                values: Iterator[bytes | int] = (content.string(longest) for _ in range(count))
            elif dictionary is None:
                raise BadPage("a dictionary is missing")
            else:
                width = content.take(1)[0] if count else 0
                indices = _hybrid(content.rest(5 * count + 64), width, count)
                values = map(dictionary.__getitem__, indices.tolist())
            for present in repeat(1, page.values) if there is None else there.tolist():
                yield next(values) if present else None
    finally:
        if dictionary is not None:
            dictionary.close()


class _Dictionary:
    """The entries of a dictionary, in a file where they are many."""

    def __init__(self, entries: Iterator[bytes | int]) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115 - see `close`
        self._places: list[tuple[int, int]] = []
        place = 0
        for entry in entries:
            if isinstance(entry, int):
                self._places.append((-1, entry))
            else:
                try:
                    self._file.write(entry)
                except OSError as error:
                    raise InputError(
                        f"no room for the dictionary of a column in {tempfile.gettempdir()}: {error}. "
                        "Make room, or set TMPDIR to another folder"
                    ) from error
                self._places.append((place, len(entry)))
                place += len(entry)

    def __getitem__(self, index: int) -> bytes | int:
        try:
            place, size = self._places[index]
        except IndexError:
            raise BadPage("an index is not in the dictionary") from None
        if place < 0:
            return size
        self._file.seek(place)
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


# --- the content of a page ---


class _Content:
    """The content of a page, decompressed as it is taken."""

    def __init__(self, file: File, page: Page, codec: str | None) -> None:
        section = _Section(file, page.start, page.start + page.packed)
        self._most_levels = 2 * page.values + 64  # bytes, more than any writer needs
        self._levels = None if page.levels is None else section.read(min(page.levels, self._most_levels))
        self._left = page.size - (page.levels or 0)
        self._pieces = _pieces(section, codec if page.compressed else None)
        self._piece = memoryview(b"")

    def levels(self) -> bytes:
        """The bytes that tell which values are null."""
        if self._levels is not None:
            return self._levels
        return self.take(min(int.from_bytes(self.take(4), "little"), self._most_levels))

    def string(self, longest: int) -> bytes | int:
        """One plain string, or the size of one that is too long."""
        size = int.from_bytes(self.take(4), "little")
        if size <= longest:
            return self.take(size)
        for _ in self._parts(size):
            pass
        return size

    def take(self, size: int) -> bytes:
        return b"".join(self._parts(size))

    def rest(self, most: int) -> bytes:
        return self.take(min(self._left, most))

    def _parts(self, size: int) -> Iterator[memoryview]:
        if size > self._left:
            raise BadPage("a page ends too early")
        self._left -= size
        while size:
            if not self._piece:
                piece = next(self._pieces, None)
                if piece is None:
                    raise BadPage("a page ends too early")
                self._piece = memoryview(piece)
            part, self._piece = self._piece[:size], self._piece[size:]
            size -= len(part)
            yield part


class _Section:
    """Part of a file, as a file that pyarrow can read."""

    closed = False

    def __init__(self, file: File, place: int, end: int) -> None:
        self._file, self._place, self._end = file, place, end

    def read(self, size: int) -> bytes:
        data = b"".join(self._file.between(self._place, min(self._place + size, self._end)))
        self._place += len(data)
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None: ...


def _pieces(section: _Section, codec: str | None) -> Iterator[bytes]:
    if codec == "snappy":
        yield from _snappy(section)
        return
    stream = pa.PythonFile(section, mode="r")
    if codec is not None:
        stream = pa.CompressedInputStream(stream, codec)
    try:
        while piece := stream.read(_READ_BYTES):
            yield piece
    except (pa.ArrowException, OSError) as error:
        raise BadPage(str(error)) from error


def _snappy(section: _Section) -> Iterator[bytes]:
    """Decompress a block of snappy in pieces.

    It is a list of literals and of copies of what came before, of which snappy writes none that looks back more than
    64 KiB. Each piece is a block of its own here, which begins with these 64 KiB as a literal.
    """
    data = section.read(_READ_BYTES)
    try:
        _, start = _varint(data, 0)
    except IndexError:
        raise BadPage("corrupt snappy block") from None
    data, before, codec = data[start:], b"", pa.Codec("snappy")
    while data:
        at, size = _snappy_elements(data)
        if size:
            literal = bytes([63 << 2]) + (len(before) - 1).to_bytes(4, "little") + before if before else b""
            block = _as_varint(len(before) + size) + literal + data[:at]
            try:
                piece = codec.decompress(block, len(before) + size, asbytes=True)
            except (pa.ArrowException, OSError) as error:
                raise BadPage("corrupt snappy block") from error
            yield piece[len(before) :]
            before = piece[-_SNAPPY_BEFORE:]
        more = section.read(_READ_BYTES)
        data = data[at:] + more
        if (data and not more) or len(data) > _SNAPPY_LITERAL:
            raise BadPage("corrupt snappy block")


def _snappy_elements(data: bytes) -> tuple[int, int]:
    """Where the last whole element of a snappy block ends, and the bytes that they all stand for."""
    steps, sizes = data.translate(_SNAPPY_STEPS), data.translate(_SNAPPY_SIZES)
    at, size, end = 0, 0, len(data)
    while at < end:
        step = steps[at]
        if step:
            if at + step > end:
                break
            size += sizes[at]
            at += step
        else:
            begin = at + (data[at] >> 2) - 58
            length = int.from_bytes(data[at + 1 : begin], "little") + 1
            if begin + length > end:
                break
            size += length
            at = begin + length
    return at, size


_SNAPPY_BEFORE = 1 << 16
_SNAPPY_LITERAL = 1 << 22  # snappy writes none of more than 64 KiB
# By the first byte of an element, of which the lower two bits tell the kind, its bytes and those that it stands for;
# 0 where a literal's length follows.
_SNAPPY_STEPS = bytes(
    ((tag >> 2) + 2 if tag < 240 else 0) if tag % 4 == 0 else (2, 3, 5)[tag % 4 - 1] for tag in range(256)
)
_SNAPPY_SIZES = bytes((tag >> 2 & 7) + 4 if tag % 4 == 1 else (tag >> 2) + 1 for tag in range(256))


# --- numbers ---


def _page(file: File, start: int, end: int) -> Page:
    for size in _HEADER_BYTES:
        try:
            fields, length = _fields(b"".join(file.between(start, min(start + size, end))), 0)
        except IndexError:
            continue  # it is longer
        try:
            kind = fields[1]
            about = fields[{_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}[kind]]
            v2 = kind == _DATA_PAGE_V2
            page = Page(
                kind=kind,
                start=start + length,
                packed=fields[3],
                size=fields[2],
                values=about[1],
                encoding=about[4 if v2 else 2],
                levels=about[5] + about[6] if v2 else None,
                compressed=about.get(7, True) if v2 else True,
            )
        except (KeyError, TypeError, AttributeError):
            break
        if kind == _DATA_PAGE and about.get(3) != _RLE:
            break
        if min(page.packed, page.values, page.levels or 0, page.size - (page.levels or 0)) < 0:
            break
        return page
    raise BadPage("a page has no readable header")


def _fields(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The integers, truth values and structures of a structure in Thrift's compact protocol, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind == 3:
            at += 1
        elif kind in (4, 5, 6):
            fields[number], at = _zigzag(data, at)
        elif kind == 7:
            at += 8
        elif kind == 8:
            size, at = _varint(data, at)
            at += size
        elif kind == 12 and depth < 3:
            fields[number], at = _fields(data, at, depth + 1)
        else:
            raise BadPage("a page has no readable header")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _as_varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _hybrid(data: bytes, width: int, count: int) -> npt.NDArray[np.int64]:
    """`count` numbers of `width` bits, in the format's mixture of runs and packed groups of eight."""
    parts = [np.zeros(0 if width else count, np.int64)]
    at, left = 0, count if width else 0
    if width > 32:
        raise BadPage("numbers of too many bits")
    try:
        while left > 0:
            head, at = _varint(data, at)
            if head & 1:
                groups = min(head >> 1, -(-left // 8))
                packed = np.frombuffer(data, np.uint8, groups * width, at)
                bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
                part = np.zeros(8 * groups, np.int64)
                for place in range(width):
                    part |= bits[:, place].astype(np.int64) << place
                at += (head >> 1) * width
            else:
                size = (width + 7) // 8
                part = np.full(min(head >> 1, left), int.from_bytes(data[at : at + size], "little"), np.int64)
                at += size
            if len(part) == 0:
                raise BadPage("an empty run")
            parts.append(part[:left])
            left -= len(parts[-1])
    except (IndexError, ValueError):
        raise BadPage("a page ends too early") from None
    return np.concatenate(parts)
