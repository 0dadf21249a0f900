"""How long does it take to look at a million windows: a page of `longsift view`, a comparison, the end of scoring?

    python benchmarks/view.py                   1,000,000 windows in 1,000 files of 4 MB of text
    python benchmarks/view.py --rows 100000

A file holds as much text as a shard of 2^20 tokens, so that a page of the highest scores reads 50 of them. Pages are
asked for over HTTP, each kind several times and never the same page twice: milliseconds until the whole page has come,
the median and the slowest. The other figures are seconds of one call, and the peak of memory of all of it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import uvicorn

from longsift.comparison import compare_runs
from longsift.measured import measured_groups
from longsift.rules import ScoreRule, Term
from longsift.tables import SCORE_KEYS, WINDOWS
from longsift.view.app import Viewer, make_app
from longsift.view.server import LOOPBACK
from longsift.view.table import ROWS, WindowTable
from measuring import parser, table, write

WINDOW_ROWS, QUICK_ROWS = 1_000_000, 3_000
FILE_ROWS, TEXT = 1_000, 4_096  # windows of a file; characters of a text
GROUPS = ("arxiv", "book", "code", "web")
TURNS = 9  # pages of a kind


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    flags = parser(__doc__ or "")
    flags.add_argument("--rows", type=int, help=f"windows [{WINDOW_ROWS:,}]")
    flags.add_argument("--folder", type=Path, help="where the tables go, for the time of the run; default: TMPDIR")
    asked = flags.parse_args(arguments)
    rows = asked.rows or (QUICK_ROWS if asked.quick else WINDOW_ROWS)
    with tempfile.TemporaryDirectory(prefix="longsift-view-", dir=asked.folder) as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        make_runs(a, b, rows)
        once = dict(calls(a, b))
        with timed() as start, WindowTable(a) as windows:
            once["view: start"] = start()
            pages = list(visits(a, windows))
    print(table(["call", "seconds"], list(once.items())))
    print(table(["page", "median ms", "slowest ms", "found"], [list(page.values()) for page in pages]))
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
    print(f"peak of memory {peak:.2f} GB")
    results = {"rows": rows, "seconds": once, "pages": pages, "peak_memory_gb": peak}
    write(asked.out, torch.device("cpu"), results | {"load_at_the_end": os.getloadavg()[0]})


def make_runs(a: Path, b: Path, rows: int) -> None:
    """Two scored runs of the method longattn, B on the windows of A; their texts are random letters, in turns."""
    draw = np.random.default_rng(0)
    letters = draw.integers(97, 123, 1 << 20, np.uint8).tobytes().decode()
    measures = [pa.field("dependency_strength", pa.float64()), pa.field("variance", pa.float64())]
    schema = pa.schema([*SCORE_KEYS, *measures])
    for folder in (a / "windows", a / "scores", b / "scores"):
        folder.mkdir(parents=True)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        n = min(FILE_ROWS, rows - first)
        groups = np.array(GROUPS)[draw.integers(0, len(GROUPS), n)].tolist()
        documents = [f"{group}/{first + i:08d}.txt" for i, group in enumerate(groups)]
        offsets = draw.integers(0, len(letters) - TEXT, n)
        keys = {
            "window_id": [f"{document}:0" for document in documents],
            "doc_id": documents,
            "group": groups,
            "start": [0] * n,
            "n_tokens": draw.integers(512, 1025, n),
        }
        windows = keys | {
            "index": [0] * n,
            "input_ids": [[0]] * n,
            "text": [letters[offset : offset + TEXT] for offset in offsets],
            "metadata": ["{}"] * n,
        }
        name = f"{number:05d}-00000.parquet"
        pq.write_table(pa.table(windows, schema=WINDOWS), a / "windows" / name, compression="zstd")
        strength = draw.normal(0.3, 0.1, n)
        for out, values in ((a, strength), (b, 0.7 * strength + draw.normal(0, 0.05, n))):
            scores = keys | {
                "ids_hash": [b"0" * 16] * n,
                "status": ["ok"] * n,
                "reason": pa.nulls(n, pa.string()),
                "dependency_strength": values,
                "variance": draw.normal(1e-9, 1e-10, n),
            }
            pq.write_table(pa.table(scores, schema=schema), out / "scores" / name, compression="zstd")
    identity = {"method": "longattn", "parameters": {"alpha": 0.5, "normalize": "zscore"}}
    calculator = {"model": "org/model", "revision": None, "device": "cpu", "dtype": "float32"}
    done = {"status": "done", "finished": 1.0}
    chosen = identity | {"keep": 0.125, "budget": None, "mix": None}
    for out, windows_section in ((a, done), (b, done | {"folder": "../a/windows"})):
        manifest = {
            "longsift": "0",
            "windows": windows_section,
            "scores": done | {"identity": identity, "calculator": calculator},
            "selected": done | {"identity": chosen},
        }
        (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def calls(a: Path, b: Path) -> Iterator[tuple[str, float]]:
    """What is done once: its name and its seconds."""
    rule = ScoreRule((Term("dependency_strength", 1.0),), "zscore")
    works: dict[str, Callable[[], object]] = {
        "the groups at the end of scoring": lambda: measured_groups(a / "scores", rule),
        "compare": lambda: compare_runs(a, b),
    }
    for name, work in works.items():
        with timed() as seconds:
            work()
            yield name, seconds()


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """The seconds since the block began."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


def visits(out: Path, windows: WindowTable) -> Iterator[dict[str, Any]]:
    """Each kind of page, over HTTP."""
    pages = -(-windows.windows // ROWS)
    kinds: dict[str, dict[str, Any]] = {
        "first pages, by rank": {},
        "first pages, by score": {"sort": "score"},
        "by score, lowest first": {"sort": "score", "reverse": "1"},
        "by tokens, from the middle": {"sort": "tokens", "page": pages // 2},
        "by score, from the middle": {"sort": "score", "page": pages // 2},
        "one group, by id": {"group": GROUPS[1], "sort": "id"},
        "selected, by score, from the middle": {"kept": "1", "sort": "score", "page": pages // 16},
        "a search that finds a tenth": {"q": "7.TXT"},
        "a search that finds a tenth, by score, from the middle": {"q": "3.txt", "sort": "score", "page": pages // 20},
        "a search that finds few": {"q": "0001", "sort": "score"},
        "a search that finds nothing": {"q": "%"},
    }
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        app = make_app(Viewer(out, windows), LOOPBACK)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            port = listening.getsockname()[1]
            _get(port, {"page": pages})  # what is imported first is not counted
            for kind, query in kinds.items():
                times = []
                for turn in range(TURNS):
                    with timed() as seconds:
                        text = _get(port, query | {"page": max(1, query.get("page", 1)) + turn})
                        times.append(1e3 * seconds())
                count = re.search(r"to [\d,]+ of ([\d,]+)", text)
                yield {
                    "page": kind,
                    "median_ms": statistics.median(times),
                    "slowest_ms": max(times),
                    "found": int(count[1].replace(",", "")) if count else 0,
                }
        finally:
            server.should_exit = True
            thread.join()


def _get(port: int, query: dict[str, Any]) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/windows?{urlencode(query)}")
    response = connection.getresponse()
    text = response.read().decode("utf-8")
    if response.status != 200:
        raise RuntimeError(f"{query}: {response.status} {text}")
    return text


if __name__ == "__main__":
    main()
