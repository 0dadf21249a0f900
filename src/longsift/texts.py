"""The beginning and end of windows' texts, read from the few pages of the windows table that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.errors import OutputError

_ROWS = 8  # read at once, on the way to a row
_THREADS = 8  # files read at once


@dataclass(frozen=True)
class Excerpt:
    """The beginning and end of a window's text, and how many characters between them are left out."""

    head: str
    tail: str
    left_out: int


def excerpts(
    windows: Path, places: Mapping[tuple[str, int], str], head: int, tail: int = 0
) -> dict[tuple[str, int], Excerpt | None]:
    """Excerpts of windows' texts, by shard and row; None for windows that were given as token ids.

    Args:
        windows: folder of the windows table.
        places: the windows that are wanted: shard and row, and the window id that stands there.
        head, tail: characters of the beginning and the end; a text of no more than both is whole.

    Raises:
        OutputError: the windows cannot be read, or are not those that were scored.
    """
    rows: dict[str, dict[int, str]] = {}
    for (shard, row), window_id in places.items():
        rows.setdefault(shard, {})[row] = window_id
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = pool.map(lambda item: _read(windows / f"{item[0]}.parquet", item[1]), rows.items())
        return {
            (shard, row): None if text is None else _excerpt(text, head, tail)
            for shard, found in zip(rows, texts, strict=True)
            for row, text in found.items()
        }


def _read(path: Path, wanted: Mapping[int, str]) -> dict[int, str | None]:
    """Texts by row; what follows the last row is not read."""
    texts: dict[int, str | None] = {}
    start = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=["window_id", "text"], use_threads=False):
                for row in range(start, start + batch.num_rows):
                    if row in wanted and batch.column(0)[row - start].as_py() == wanted[row]:
                        texts[row] = batch.column(1)[row - start].as_py()
                start += batch.num_rows
                if start > max(wanted):
                    break
    except (OSError, pa.ArrowException) as error:
        raise OutputError(
            f"{path} cannot be read ({error}); its scores were. Cut the windows again with --overwrite."
        ) from error
    if len(texts) < len(wanted):
        raise OutputError(f"{path} does not hold the windows that were scored. Score them again with --overwrite.")
    return texts


def _excerpt(text: str, head: int, tail: int) -> Excerpt:
    if len(text) <= head + tail:
        return Excerpt(text, "", 0)
    return Excerpt(text[:head], text[len(text) - tail :], len(text) - head - tail)
