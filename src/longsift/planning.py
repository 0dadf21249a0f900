"""What a run would do, measured on a part of the documents and one window: `--dry-run`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from longsift.documents import BadRow, Document, read_documents
from longsift.errors import InputError
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.pieces import Cutter
from longsift.scoring import Scorer
from longsift.scoring_stage import model_of, windows_to_score
from longsift.shards import RunFolder
from longsift.sources import Source, find_sources
from longsift.tables import parquet_files
from longsift.windows import Tally, Window

_SOURCES = 4  # read from, spread over the corpus
_BYTES = 4 << 20  # read in all: a second or two of cutting
_TOKENS = 1024  # measured first, then twice as many if it takes
_SECONDS = 0.5  # less than this; a third length if half of it is more, and so on


def estimate(
    inputs: Sequence[str],
    model: ModelOptions = ModelOptions(),
    windows: WindowOptions = WindowOptions(),
    scores: ScoreOptions = ScoreOptions(),
) -> dict[str, Any]:
    """Say how many documents, windows and tokens a run would have and how long it would take; write nothing.

    A part of a few sources is read and cut, and the rest is taken to be like it, byte for byte. The time of
    scoring is that of one window, or what its beginning tells of it where a window takes long. `--limit` and
    `--sample` are honoured.

    Raises:
        InputError: nothing to read, or no window in the part that was read.
    """
    sources = find_sources(inputs)
    looked_at = sources[:: -(-len(sources) // _SOURCES)]
    cutter = Cutter(model, windows)
    tally = Tally()
    first: Window | None = None
    read: list[int] = []

    def part(source: Source) -> Iterator[Document | BadRow]:
        consumed = looked = 0

        def on_bytes(count: int) -> None:
            nonlocal consumed
            consumed += count

        for row in read_documents(source, cutter.read, on_bytes):
            if consumed > looked >= _BYTES / len(looked_at):
                break  # it is the first of the bytes that were read after these
            looked = consumed
            yield row
        else:
            looked = source.size
        read.append(min(looked, source.size))

    started = time.perf_counter()
    for source in looked_at:
        for row in cutter.windows(part(source)):
            tally.add(row)
            if first is None and isinstance(row, Window):
                first = row
    cutting = time.perf_counter() - started
    if first is None:
        raise InputError(
            f"None of the {tally.documents:,} documents looked at gives a window. Choose a smaller --window."
        )

    size = sum(source.size for source in sources)
    whole = size / max(sum(read), 1)
    if windows.limit is not None:
        whole = min(whole, windows.limit / tally.documents)
    sampled = min(1.0, (windows.sample or tally.windows * whole) / (tally.windows * whole))
    n_windows = round(tally.windows * whole * sampled)
    tokens = round(tally.tokens * whole * sampled)
    return {
        "sources": len(sources),
        "bytes": size,
        "bytes_looked_at": sum(read),
        "documents": round(tally.documents * whole),
        "bad_rows": round(sum(tally.bad_rows.values()) * whole),
        "too_short": round(tally.too_short * whole),
        "windows": n_windows,
        "tokens": tokens,
        "seconds_cutting": cutting * whole,
        **_scoring(Scorer.from_options(model, scores), first.input_ids, tokens),
    }


def estimate_scores(
    out: Path, model: ModelOptions = ModelOptions(), scores: ScoreOptions = ScoreOptions()
) -> dict[str, Any]:
    """Say how long scoring the windows of a run folder would take; write nothing.

    Raises:
        OutputError: the folder has no finished windows.
        InputError: it has no window.
    """
    folder = RunFolder(out)
    section = windows_to_score(folder)
    first = next(pq.ParquetFile(parquet_files(folder.windows)[0]).iter_batches(1, columns=["input_ids"]))
    counts = {name: section["counts"][name] for name in ("documents", "windows", "tokens")}
    scorer = Scorer.from_options(model_of(section, model), scores)
    return counts | _scoring(scorer, first["input_ids"][0].values.to_numpy(), counts["tokens"])


def _scoring(scorer: Scorer, input_ids: npt.NDArray[np.int32], tokens: int) -> dict[str, Any]:
    """The time of scoring `tokens`, from that of one window or of its beginnings."""
    length = min(max(_TOKENS, scorer.method.shortest()), len(input_ids))
    seconds = [_seconds(scorer, input_ids, length)]
    while length < len(input_ids) and seconds[-1] < _SECONDS / len(seconds):
        length = min(2 * length, len(input_ids))
        seconds.append(_seconds(scorer, input_ids, length, at_least=1))
    times = len(input_ids) / length
    # A share for each token and one for each pair of them; the latter is what twice as many take beyond twice as long.
    pairs = min(max(0.0, 2 * (seconds[-1] - 2 * seconds[-2])), seconds[-1]) if len(seconds) > 1 else 0.0
    window = (seconds[-1] - pairs) * times + pairs * times**2
    return {
        "seconds_scoring": tokens / len(input_ids) * window,
        "tokens_per_second": len(input_ids) / window,
        "device": scorer.describe()["device"],
    }


def _seconds(scorer: Scorer, input_ids: npt.NDArray[np.int32], length: int, at_least: int = 2) -> float:
    """The better of two times: the first one may warm up, and others may use the machine. One will do if it is long."""
    times: list[float] = []
    with _no_warnings(length < len(input_ids)):  # of a length that was not asked for
        while len(times) < at_least or (len(times) < 2 and times[0] < _SECONDS / 2):
            started = time.perf_counter()
            scorer.measure(input_ids[:length])
            times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def _no_warnings(wanted: bool) -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING if wanted else before)
    try:
        yield
    finally:
        logging.disable(before)
