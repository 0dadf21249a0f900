"""The tables of a run: their schemas, their places, and how a file becomes visible whole or not at all.

Layout of a run folder (other programs rely on it)::

    OUT/windows/*.parquet      token windows            WINDOWS
    OUT/quarantine/*.parquet   rows that were not read  QUARANTINE
    OUT/scores/*.parquet       one row a window         SCORE_KEYS + the method's own columns
    OUT/selected/*.parquet     the kept windows         (see longsift.datasets)
    OUT/report.html
    OUT/maps/*.parquet         dependency maps of the report, which may be thrown away (longsift.report.maps)
    OUT/manifest.json          what was run, with what, on what

A scores file has the name of its windows file and the same rows in the same order.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from longsift.errors import OutputError

WINDOWS = pa.schema(
    [
        pa.field("window_id", pa.string(), nullable=False),  # "<doc_id>:<index>"
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),  # 0-based, ordered by start
        pa.field("start", pa.int64(), nullable=False),  # offset in the document's own tokens
        pa.field("n_tokens", pa.int32(), nullable=False),  # len(input_ids), special tokens included
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.large_string()),  # the characters the window covers; null for rows given as ids
        pa.field("metadata", pa.large_string()),  # the document's other columns, a JSON object
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64()),  # 0-based row (line) of the file; null when the whole file is meant
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.string()),  # the first characters of the row, escaped to printable ASCII
    ]
)

SCORE_KEYS = pa.schema(
    [
        pa.field("window_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("start", pa.int64()),  # as in WINDOWS
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("ids_hash", pa.binary(16)),  # BLAKE2b of input_ids as little-endian int32
        pa.field("status", pa.string(), nullable=False),  # "ok" or "failed"; a failed row has null measures
        pa.field("reason", pa.string()),
    ]
)


def parquet_files(folder: Path) -> list[Path]:
    """The files of a table, in order; temporary ones are left out."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the block ends well.

    The file is flushed to disk before it becomes visible, so that a crash leaves the whole file or none.
    On an error the temporary file is removed.

    Raises:
        OutputError: the file cannot be written: the disk is full, say, or may not be written to.
    """
    # Machines that share a folder may have processes of equal numbers.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error}. Once that is mended, the same command goes on where it stopped."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
