"""Record batches of an Arrow stream, some rows at a time, in bounded memory, however large they are.

Arrow reads a batch whole, and datasets writes 1,000 rows into one whatever their size: a batch of books is a gigabyte.
Here Arrow is given empty memory in place of a large batch. It reads none of it, as it only tells which column lies
where; then that memory is filled for some rows, and emptied, and filled for the next.

Format: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from longsift.sources import SourceFile

__all__ = ["ArrowStream", "is_bytes"]

_LARGE_BYTES = 1 << 26  # smaller batches are read whole
_RECORD_BATCH = 3  # kind of a message


class ArrowStream:
    """The file of an Arrow stream, to be read by `pyarrow.ipc.open_stream` through `pyarrow.PythonFile`."""

    closed = False

    def __init__(self, file: SourceFile, size: int) -> None:
        """Begin at the start of a file of `size` bytes."""
        self._file, self._size = file, size
        self._place = 0
        self._last = b""
        self._body: _Body | None = None

    def read(self, size: int) -> bytes | mmap.mmap:
        start, stop = self._place, min(self._place + size, self._size)
        if size > _LARGE_BYTES and _is_plain_batch(self._last):
            if stop < start + size:
                return b""  # the file is cut off, as Arrow will say
            self._body, self._last = _Body(self._file, start, size), b""
            self._place = stop
            return self._body.memory
        self._last = b"".join(self._file.between(start, stop))
        self._place += len(self._last)
        return self._last

    def parts(self, batch: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch | int]:
        """The rows of the batch that was read last, in parts to be used one after the other.

        Args:
            most: bytes of a part.

        Yields:
            Some rows; or the size in bytes of one that takes more.

        Raises:
            pa.ArrowInvalid: the batch is corrupt.
            InputError: the storage fails.
        """
        body, self._body = self._body, None
        if body is None:
            yield batch
            return
        batch.validate()  # that lengths are those of the buffers
        ranges = [(0, batch.num_rows)] if batch.num_rows else []
        while ranges:
            start, stop = ranges.pop()
            leaves = [leaf for column in batch.columns for leaf in body.leaves(column, start, stop)]
            size = sum(high - low for low, high in leaves)
            if size <= most:
                for low, high in leaves:
                    body.fill(low, high)
                yield batch.slice(start, stop - start)
                for low, high in leaves:
                    body.empty(low, high)
            elif stop - start == 1:
                yield size
            else:
                middle = (start + stop) // 2
                ranges += [(middle, stop), (start, middle)]

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Left to the owner of the file; pyarrow asks for it."""


class _Body:
    """Memory that stands for the body of a batch, of which only what was filled is there."""

    def __init__(self, file: SourceFile, place: int, size: int) -> None:
        self._file, self._place = file, place
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = pa.py_buffer(self.memory).address
        self._known: set[tuple[int, int]] = set()

    def leaves(self, array: pa.Array, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where the values of some rows lie, from byte to byte; offsets and marks of null are filled on the way."""
        kind = array.type
        if pa.types.is_dictionary(kind):
            array, kind = array.indices, array.type.index_type
        if stop <= start or pa.types.is_null(kind):
            return
        first, *others = array.buffers()
        if first is not None:
            self._fill_once(first)
        if is_bytes(kind):
            low, high = self._bounds(array, others[0], 0 if others[1] is None else others[1].size, start, stop)
            if others[1] is not None:
                yield self._range(others[1], low, high)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            yield from self.leaves(array.values, *self._bounds(array, others[0], len(array.values), start, stop))
        elif pa.types.is_struct(kind):
            for index in range(kind.num_fields):
                yield from self.leaves(array.field(index), start, stop)
        elif pa.types.is_primitive(kind):
            yield self._range(others[0], start * kind.bit_width // 8, -(-stop * kind.bit_width // 8))
        else:
            for buffer in others:
                if buffer is not None:
                    self._fill_once(buffer)

    def _bounds(self, array: pa.Array, offsets: pa.Buffer, end: int, start: int, stop: int) -> tuple[int, int]:
        """The offsets of some rows."""
        wide = pa.types.is_large_list(array.type) or pa.types.is_large_unicode(array.type)
        dtype = np.dtype(np.int64 if wide or pa.types.is_large_binary(array.type) else np.int32)
        self._fill_once(offsets)
        numbers = np.frombuffer(offsets, dtype, len(array) + 1)
        if numbers[0] < 0 or numbers[-1] > end or (np.diff(numbers) < 0).any():
            raise pa.ArrowInvalid("offsets point out of their buffer")
        return int(numbers[start]), int(numbers[stop])

    def _fill_once(self, buffer: pa.Buffer) -> None:
        place = self._range(buffer, 0, buffer.size)
        if place not in self._known:
            self.fill(*place)
            self._known.add(place)

    def _range(self, buffer: pa.Buffer, start: int, stop: int) -> tuple[int, int]:
        low = buffer.address - self._address + start
        if start == stop:
            return low, low
        if not (stop <= buffer.size and low >= 0 and low + stop - start <= len(self.memory)):
            raise pa.ArrowInvalid("a buffer reaches out of its batch")
        return low, low + stop - start

    def fill(self, low: int, high: int) -> None:
        for chunk in self._file.between(self._place + low, self._place + high):
            self.memory[low : low + len(chunk)] = chunk
            low += len(chunk)

    def empty(self, low: int, high: int) -> None:
        """Give back the memory, but for that of its first and last pages, in which others may begin."""
        low, high = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
        if low < high:
            self.memory.madvise(mmap.MADV_DONTNEED, low, high - low)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a type is of strings or bytes, each anywhere in one buffer."""
    return kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary())


def _is_plain_batch(message: bytes) -> bool:
    """Whether a message, a FlatBuffers table, announces a record batch that is not compressed."""
    try:
        [root] = struct.unpack_from("<I", message)
        kind = _field(message, root, 1)
        header = _field(message, root, 2)
        if not kind or not header or message[kind] != _RECORD_BATCH:
            return False
        return not _field(message, header + struct.unpack_from("<I", message, header)[0], 3)
    except (struct.error, IndexError):
        return False


def _field(data: bytes, table: int, index: int) -> int:
    """Where a field of a table lies; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError
    if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    [place] = struct.unpack_from("<H", data, vtable + 4 + 2 * index)
    return table + place if place else 0
