"""What does a run cost beside the measuring itself? The scores stage and a bare Scorer loop, over the same windows.

    python benchmarks/engine_overhead.py                     2,000 windows of 512 tokens, embedded calculator, LongAttn
    python benchmarks/engine_overhead.py --length 2048       longer windows

Bare calls `Scorer.measure` for one window after the other. The stage is `longsift.score` in one process: it also reads
windows, writes scores in shards, records these and shows no progress. Both load the calculator; windows are cut before.
They take turns. Seconds are by the clock; processor seconds, of all threads, say what both cost on a machine that does
other work too.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import longsift
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.scoring import Scorer, resolve_device
from measuring import parser, table, write

WINDOWS, QUICK_WINDOWS = 2_000, 12
VOCABULARY = 8_192  # of the embedded calculator


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, and write the figures where `--out` says."""
    flags = parser(__doc__ or "")
    flags.add_argument("--length", type=int, default=512, help="tokens of a window")
    flags.add_argument("--method", default="longattn")
    flags.add_argument("--rounds", type=int, default=3)
    options = flags.parse_args(arguments)
    device = resolve_device(options.device)
    number = QUICK_WINDOWS if options.quick else WINDOWS
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(number, options.length), dtype=np.int32)
    scoring = ScoreOptions(method=options.method, device=str(device))

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"input_ids": window.tolist()}) + "\n" for window in ids), "utf-8")
        run = Path(folder) / "run"
        longsift.cut([str(rows)], run, ModelOptions(), WindowOptions(), quiet=True)

        def bare() -> None:
            scorer = Scorer.from_options(ModelOptions(), scoring)
            for window in ids:
                scorer.measure(window)

        def stage() -> None:
            counts = longsift.score(run, ModelOptions(), scoring, overwrite=True, quiet=True)
            assert (counts["windows"], counts["failed"]) == (number, 0)

        costs = _take_turns({"bare": bare, "stage": stage}, 1 if options.quick else options.rounds)

    results = {name: {"seconds": wall, "processor_seconds": cpu} for name, (wall, cpu) in costs.items()}
    overhead = {key: results["stage"][key] / results["bare"][key] - 1 for key in results["bare"]}
    print(table(["", "seconds", "processor seconds"], [[name, *row.values()] for name, row in results.items()]))
    print(f"overhead: {overhead['seconds']:.1%} by the clock, {overhead['processor_seconds']:.1%} of processor time")
    what = {"windows": number, "length": options.length, "method": options.method, "rounds": options.rounds}
    write(options.out, device, what | results | {"overhead": overhead})


def _take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds by the clock and of the processor, of calls in turns; the first turn is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {
        name: (statistics.median(wall for wall, _ in some), statistics.median(cpu for _, cpu in some))
        for name, some in times.items()
    }


if __name__ == "__main__":
    main()
