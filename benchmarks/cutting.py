"""How fast does one file become windows, with one process that reads for all, and with each reading pieces of its own?

    python benchmarks/cutting.py                   1 GB of JSON lines; 1, half and all of the cores
    python benchmarks/cutting.py --workers 16 32

The text is that of the standard library and the installed packages, over and over, in one file. `together` cuts it as
one piece, `apart` in pieces of which each process has many. Seconds by the clock of `longsift.cutting.cut`, with the
start of the processes and the loading of the tokenizer; the better of two rounds, taken in turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longsift.cutting import cut
from longsift.options import ModelOptions, WindowOptions
from measuring import parser, table, write
from shapes import write_corpus

CHARACTERS, QUICK_CHARACTERS = 240_000_000, 200_000
TIMES = 4  # that the file holds them
WINDOW = 4096
PIECES = 256
ROUNDS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    cores = len(os.sched_getaffinity(0))
    flags = parser(__doc__ or "")
    flags.add_argument("--workers", type=int, nargs="+", default=sorted({1, max(1, cores // 2), cores}))
    flags.add_argument("--folder", type=Path, help="where the file goes while it is needed; default: TMPDIR")
    asked = flags.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="longsift-cutting-", dir=asked.folder) as name:
        folder = Path(name)
        write_corpus(folder / "corpus", QUICK_CHARACTERS if asked.quick else CHARACTERS, 4)
        file = folder / "all.jsonl"
        with file.open("wb") as whole:
            for path in sorted((folder / "corpus").iterdir()) * TIMES:
                whole.write(path.read_bytes())
        size = file.stat().st_size
        rows = [measured(file, folder / "run", workers, size) for workers in asked.workers]
    heads = ["processes", "together s", "apart s", "together, tokens/s", "apart, tokens/s"]
    ways = ("together", "apart")
    print(
        table(
            heads,
            [
                [row["workers"], *(row[way] for way in ways), *(round(row["tokens"] / row[way]) for way in ways)]
                for row in rows
            ],
        )
    )
    write(asked.out, torch.device("cpu"), {"bytes": size, "window": WINDOW, "rows": rows})


def measured(file: Path, out: Path, workers: int, size: int) -> dict[str, Any]:
    """The seconds that both ways take."""
    pieces = {"together": size, "apart": -(-size // PIECES)}
    seconds: dict[str, list[float]] = {way: [] for way in pieces}
    tokens = set()
    for _ in range(ROUNDS):
        for way, piece_bytes in pieces.items():
            options = WindowOptions(window=WINDOW, cut_workers=workers, piece_bytes=piece_bytes)
            began = time.perf_counter()
            counts = cut([str(file)], out, ModelOptions(), options, overwrite=True, quiet=True)
            seconds[way].append(time.perf_counter() - began)
            tokens.add(counts["tokens"])
    assert len(tokens) == 1
    return {"workers": workers, "tokens": tokens.pop(), **{way: min(times) for way, times in seconds.items()}}


if __name__ == "__main__":
    main()
