"""How long does a report take, in how much memory, how large is its page, and how soon does a browser show it?

    python benchmarks/report.py                     1,100,000 windows in 400 files, 32 groups
    python benchmarks/report.py --rows 100000

The windows are of 32,768 tokens, cut by longsift's own rule, with 6,000 characters of text each and without ids; about
half of them overlap another. An eighth is selected. The report is made in a process of its own, without dependency
maps: seconds by the clock and the largest resident memory, from the ranking to the page. The page is opened in headless
Chromium, where there is one: milliseconds until the browser has painted first, and until all charts are drawn.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longsift.tables import SCORE_KEYS, WINDOWS, publish
from longsift.windows import window_starts

ROWS, QUICK_ROWS, FILES, QUICK_FILES = 1_100_000, 5_000, 400, 4
GROUPS = 32
LENGTH = 32_768
CHARACTERS = 6_000
_SHAPES = 4096  # kinds of documents, by their length
_TEXTS = 16  # different ones in a file
_SENTENCE = "the window of a document < that & depends on what 語 was said long before it — and on little else"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    import torch  # only here: the process that is measured needs none

    from measuring import parser, table, write

    flags = parser(__doc__ or "")
    flags.add_argument("--rows", type=int, help=f"windows [{ROWS:,}]")
    flags.add_argument("--files", type=int, help=f"files that hold them [{FILES}]")
    flags.add_argument("--folder", type=Path, help="where the run goes, for the time of the benchmark; default: TMPDIR")
    flags.add_argument("--page", type=Path, help="where to keep the page")
    asked = flags.parse_args(arguments)
    rows = asked.rows or (QUICK_ROWS if asked.quick else ROWS)
    files = asked.files or (QUICK_FILES if asked.quick else FILES)
    with tempfile.TemporaryDirectory(prefix="longsift-report-", dir=asked.folder) as folder:
        out = Path(folder)
        began = time.perf_counter()
        write_run(out, rows, files)
        print(f"{rows:,} windows in {files} files made in {time.perf_counter() - began:.0f} s", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(report, out).result()
        result |= {"page_bytes": (out / "report.html").stat().st_size, **painted(out / "report.html")}
        if asked.page:
            shutil.copy(out / "report.html", asked.page)
    print(table(list(result), [list(result.values())]))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    write(
        asked.out,
        torch.device("cpu"),
        {"rows": rows, "files": files, "groups": GROUPS, "load_at_the_end": load, "report": result},
    )


def write_run(out: Path, rows: int, files: int) -> None:
    """A scored run of `longattn`, of random scores."""
    draw = np.random.default_rng(0)
    shapes = [window_starts(int(n), LENGTH) for n in LENGTH * (1 + draw.exponential(1.0, _SHAPES))]
    starts = np.concatenate([np.array(shape) for shape in shapes])
    sizes = np.array([len(shape) for shape in shapes])
    offsets = np.cumsum(sizes) - sizes
    measures = [pa.field("dependency_strength", pa.float64()), pa.field("variance", pa.float64())]
    weights = 1 / np.arange(1, GROUPS + 1)
    counts = [rows // files + (number < rows % files) for number in range(files)]
    lost = 0
    for number, n in enumerate(counts):
        shard = f"{number:05d}-00000"
        drawn = draw.integers(0, _SHAPES, n)
        of = np.repeat(np.arange(n), sizes[drawn])[:n]  # the document of each row
        index = np.arange(n) - (np.cumsum(sizes[drawn]) - sizes[drawn])[of]
        groups = np.array([f"source-{i:02d}" for i in range(GROUPS)])[
            draw.choice(GROUPS, n, p=weights / weights.sum())[of]
        ]
        documents = [f"{group}/{number:05d}-{i:07d}" for group, i in zip(groups, of, strict=True)]
        strength = draw.normal(0.3, 0.1, n)
        keys = {
            "window_id": [f"{document}:{i}" for document, i in zip(documents, index, strict=True)],
            "doc_id": documents,
            "group": groups,
            "start": starts[offsets[drawn][of] + index],
            "n_tokens": np.full(n, LENGTH, np.int32),
        }
        failed = draw.random(n) < 1e-4
        scores = keys | {
            "ids_hash": pa.nulls(n, pa.binary(16)),
            "status": np.where(failed, "failed", "ok"),
            "reason": pa.array(np.where(failed, "out of memory", ""), mask=~failed),
            "dependency_strength": pa.array(strength, mask=failed),
            "variance": pa.array(1e-6 * np.exp(draw.normal(0, 0.5, n) - 2 * strength), mask=failed),
        }
        texts = [" ".join(draw.choice(_SENTENCE.split(), CHARACTERS // 3))[:CHARACTERS] for _ in range(_TEXTS)]
        windows = keys | {
            "index": index.astype(np.int32),
            "input_ids": [[]] * n,
            "text": [texts[i % _TEXTS] for i in range(n)],
            "metadata": ["{}"] * n,
        }
        for name, columns, schema in (
            ("scores", scores, pa.schema([*SCORE_KEYS, *measures])),
            ("windows", windows, WINDOWS),
        ):
            with publish(out / name / f"{shard}.parquet") as path:
                pq.write_table(pa.table(columns, schema=schema), path, compression="zstd", row_group_size=1024)
        lost += int(failed.sum())
        record = {"windows": n, "failed": int(failed.sum()), "tokens": n * LENGTH, "seconds": float(1 + draw.random())}
        with publish(out / "shards" / "scores" / f"{shard}.json") as path:
            path.write_text(json.dumps(record | {"devices": 1, "reasons": {}}))
    (out / "manifest.json").write_text(json.dumps(_manifest(rows, files, lost)))


def _manifest(rows: int, files: int, failed: int) -> dict[str, Any]:
    inputs = [[f"corpus/part-{i:05d}.jsonl.zst", 1_000_000_000] for i in range(files)]
    identity = {"method": "longattn", "parameters": {"alpha": 0.5, "normalize": "zscore"}}
    counts = {"documents": rows, "bad_rows": 0, "too_short": 0, "too_short_tokens": 0}
    return {
        "longsift": "made",
        "windows": {
            "status": "done",
            "finished": 1.0,
            "seconds": 1.0,
            "identity": {"inputs": inputs, "group_by": "source"},
            "length": LENGTH,
            "tokenizer": None,
            "counts": counts | {"windows": rows, "tokens": rows * LENGTH},
        },
        "scores": {
            "status": "done",
            "finished": 2.0,
            "identity": identity,
            "calculator": {"model": "made", "revision": None, "device": "cuda:0", "dtype": "bfloat16"},
            "counts": {"windows": rows, "failed": failed, "tokens": rows * LENGTH, "seconds": 600.0},
            "device_seconds": 600.0,
            "reasons": {"out of memory": failed} if failed else {},
        },
        "selected": {
            "status": "done",
            "identity": identity | {"keep": 0.125, "budget": None, "mix": None, "overlap": False, "dedup": None},
        },
    }


def report(out: Path) -> dict[str, Any]:
    """Make the report; returns what it took."""
    from longsift import pipeline
    from selection import peak_memory

    began, worked = time.perf_counter(), sum(os.times()[:2])
    pipeline.report(out)
    return {
        "seconds": time.perf_counter() - began,
        "core_seconds": sum(os.times()[:2]) - worked,
        "peak_memory_gb": peak_memory() / 1e9,
    }


def painted(page: Path) -> dict[str, float | None]:
    """When Chromium paints a page first and when its charts are drawn, the median of five, from its opening."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return {"first_paint_ms": None, "drawn_ms": None}
    from playwright.sync_api import sync_playwright

    paints, draws = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(5):
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            shown = context.new_page()
            shown.goto(page.resolve().as_uri())
            while not shown.evaluate("Boolean(document.documentElement.dataset.drawn)"):
                time.sleep(0.01)
            draws.append(shown.evaluate("performance.now()"))
            paints.append(shown.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            context.close()
        browser.close()
    return {"first_paint_ms": sorted(paints)[2], "drawn_ms": sorted(draws)[2]}


if __name__ == "__main__":
    main()
