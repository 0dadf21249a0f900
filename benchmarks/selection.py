"""How long does a selection take, and in how much memory? Rows of scores in three groups, in hundreds of files.

    python benchmarks/selection.py                     10,000,000 rows in 400 files
    python benchmarks/selection.py --rows 100000000

Documents are cut into windows by longsift's own rule, so that about half of the windows overlap another; one window in
a hundred has the ids of another. Kept is an eighth of the tokens, written as ids and scores (--no-text --no-ids). Each
selection runs in a process of its own: seconds by the clock, seconds of the cores, the largest resident memory, and
the largest size of what it spilled beside the scores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longsift.tables import SCORE_KEYS, publish
from longsift.windows import window_starts

ROWS, QUICK_ROWS, FILES, QUICK_FILES = 10_000_000, 20_000, 400, 8
GROUPS = ("arxiv", "book", "web")
LENGTH = 32_768
KEPT = 1 / 8  # of the tokens
CASES: dict[str, dict[str, Any]] = {
    "--overlap": {},
    "--no-overlap": {"overlap": False},
    "--no-overlap --dedup exact": {"overlap": False, "dedup": "exact"},
}
_SHAPES = 4096  # kinds of documents, by their length


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    import torch  # only here: the processes that are measured need none

    from measuring import parser, table, write

    flags = parser(__doc__ or "")
    flags.add_argument("--rows", type=int, help=f"rows of scores [{ROWS:,}]")
    flags.add_argument("--files", type=int, help=f"files that hold them [{FILES}]")
    flags.add_argument("--threads", type=int, help="of DuckDB; all cores, up to 8, by default")
    flags.add_argument("--folder", type=Path, help="where the rows go, for the time of the run; default: TMPDIR")
    asked = flags.parse_args(arguments)
    rows = asked.rows or (QUICK_ROWS if asked.quick else ROWS)
    files = asked.files or (QUICK_FILES if asked.quick else FILES)
    with tempfile.TemporaryDirectory(prefix="longsift-selection-", dir=asked.folder) as folder:
        began = time.perf_counter()
        write_scores(Path(folder) / "scores", rows, files)
        print(f"{rows:,} rows in {files} files made in {time.perf_counter() - began:.0f} s", flush=True)
        results = []
        for case, request in CASES.items():
            results.append({"case": case, **measured(Path(folder), rows, request, asked.threads)})
            print(f"{case}: {results[-1]['seconds']:.1f} s", flush=True)
    print(table(list(results[0]), [list(result.values()) for result in results]))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    write(
        asked.out, torch.device("cpu"), {"rows": rows, "files": files, "load_at_the_end": load, "selections": results}
    )


def write_scores(folder: Path, rows: int, files: int) -> None:
    """Score files as the method `calibrated` writes them, of random scores."""
    draw = np.random.default_rng(0)
    shapes = [window_starts(int(n), LENGTH) for n in LENGTH * (1 + draw.exponential(1.0, _SHAPES))]
    starts = np.concatenate([np.array(shape) for shape in shapes])
    sizes = np.array([len(shape) for shape in shapes])
    offsets = np.cumsum(sizes) - sizes
    schema = pa.schema([*SCORE_KEYS, ("calibrated", pa.float64()), ("far_focus", pa.float64())])
    for number in range(files):
        n = rows // files + (number < rows % files)
        drawn = draw.integers(0, _SHAPES, n)
        of = np.repeat(np.arange(n), sizes[drawn])[:n]  # the document of each row
        index = np.arange(n) - (np.cumsum(sizes[drawn]) - sizes[drawn])[of]
        groups = np.array(GROUPS)[draw.integers(0, len(GROUPS), n)[of]]
        documents = [f"{group}/{number:05d}-{i:07d}" for group, i in zip(groups, of, strict=True)]
        hashes = draw.integers(0, 256, (n, 16), np.uint8)
        copies = draw.integers(0, n, (2, n // 100))
        hashes[copies[0]] = hashes[copies[1]]
        columns = {
            "window_id": [f"{document}:{i}" for document, i in zip(documents, index, strict=True)],
            "doc_id": documents,
            "group": groups,
            "start": starts[offsets[drawn][of] + index],
            "n_tokens": np.full(n, LENGTH, np.int32),
            "ids_hash": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(hashes.tobytes())]),
            "status": ["ok"] * n,
            "reason": pa.nulls(n, pa.string()),
            "calibrated": draw.normal(size=n),
            "far_focus": draw.random(n),
        }
        with publish(folder / f"shard-{number:05d}-00000.parquet") as path:
            pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def measured(folder: Path, rows: int, request: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """One selection in a process of its own."""
    spilled, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            spilled.append(sum(_size(path) for path in folder.glob(".selection-*/**/*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(select, folder, int(rows * LENGTH * KEPT), request, threads).result()
    finally:
        ended.set()
        watcher.join()
    return result | {"spilled_gb": max(spilled) / 1e9}


def select(folder: Path, budget: int, request: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """Choose and write; returns what it took and what was kept."""
    from longsift.datasets import write_dataset
    from longsift.selection import ScoreRule, Term, choose

    rule = ScoreRule((Term("calibrated", 1.0), Term("far_focus", 0.0)), "zscore")
    began, worked = time.perf_counter(), sum(os.times()[:2])
    with choose(folder / "scores", rule, budget=budget, threads=threads, **request) as choice:
        write_dataset(choice, folder / "windows", folder, text=False, input_ids=False, card={})
        return {
            "seconds": time.perf_counter() - began,
            "core_seconds": sum(os.times()[:2]) - worked,
            "peak_memory_gb": peak_memory() / 1e9,
            "kept": choice.kept,
            "passed_over": choice.passed_over,
            "duplicates": choice.duplicates,
        }


def peak_memory() -> int:
    """Bytes of this process's memory at its largest; Linux counts them from the start of the program."""
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # removed meanwhile
        return 0


if __name__ == "__main__":
    main()
