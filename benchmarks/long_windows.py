"""How long can a window be on one GPU? Seconds and peak memory of one window of 32,768 to 1,048,576 tokens.

    python benchmarks/long_windows.py
    python benchmarks/long_windows.py --lengths 32768 1048576 --case longattn-8b
    python benchmarks/long_windows.py --curve docs/long-windows.svg

LongAttn on Llama-3.1-8B's first layer, LADM on one layer and on all of TinyLlama-1.1B, dense too; random weights and
ids, through `Scorer.measure`: ids on the host to measures on the host. Time grows with the square of the length, so a
length that would take longer than --most-seconds by that rule is left out and told so. Peak memory is all that PyTorch
holds for the process, the calculator included.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from curve import curve
from longsift.calculators.checkpoint import EMBEDDED
from longsift.scoring import Scorer, resolve_device
from measuring import Timing, parser, peak_bytes, table, time_calls, write
from shapes import random_windows
from throughput import Case, Models

LENGTHS = [1 << bits for bits in range(15, 21)]
QUICK = [2_560, 5_120]
CASES = {
    "longattn-8b": Case("LongAttn, Llama-3.1-8B", "longattn", "llama-3.1-8b"),
    "ladm-layer": Case("LADM, TinyLlama-1.1B, one layer", "ladm", "tinyllama-1.1b", {"layers": [0]}),
    "ladm-layer-dense": Case(
        "LADM, TinyLlama-1.1B, one layer, dense", "ladm", "tinyllama-1.1b", {"layers": [0], "dense": True}
    ),
    "ladm": Case("LADM, TinyLlama-1.1B, all layers", "ladm", "tinyllama-1.1b"),
    "ladm-dense": Case("LADM, TinyLlama-1.1B, all layers, dense", "ladm", "tinyllama-1.1b", {"dense": True}),
}


def rows_of(
    name: str, models: Models, lengths: Sequence[int], most_seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each length, up to the first that takes too long."""
    case = CASES[name]
    scorer = Scorer(case.method, model=models.of(case), device=str(device), **case.parameters)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        row: dict[str, Any] = {"case": case.title, "name": name, "length": length}
        if rows:
            expected = rows[-1]["seconds"] * (length / rows[-1]["length"]) ** 2
            if expected > most_seconds:
                print(f"{case.title}: {length:,} tokens left out, since they would take about {expected:.0f} s")
                break
        windows = random_windows(2, length, scorer.calculator.vocab_size)
        few = length > 1 << 16
        times: list[Timing] = []
        peak = peak_bytes(lambda: times.append(_timed(scorer, windows, device, few)), device)  # noqa: B023 called here
        row |= {"seconds": times[0].ms / 1e3, "high_seconds": times[0].high_ms / 1e3, "peak_bytes": peak}
        rows.append(row)
    return rows


def _timed(scorer: Scorer, windows: Sequence[Any], device: torch.device, few: bool) -> Timing:
    """Time single windows, after two that compile kernels and capture graphs; after one where windows are long."""
    warm_up, least, most = (1, 1, 2) if few else (3, 3, 10)
    return time_calls(lambda turn: scorer.measure(windows[turn % 2]), device, warm_up=warm_up, least=least, most=most)


def long_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of a window by its length."""
    cells = [
        (
            row["case"],
            row["length"],
            row["seconds"],
            row["high_seconds"],
            None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30,
        )
        for row in rows
    ]
    return table(("one window", "tokens", "s", "largest s", "peak GiB"), cells)


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--case", choices=[*CASES], action="append", help="only this one; may be repeated")
    flags.add_argument("--lengths", type=int, nargs="+", default=None)
    flags.add_argument("--most-seconds", type=float, default=15.0, help="of one window")
    flags.add_argument("--curve", type=Path, help="file for the curve, SVG")
    flags.add_argument("--from", dest="source", type=Path, help="draw the curve of an earlier result; measure nothing")
    args = flags.parse_args(arguments)
    if args.source is not None:
        content = json.loads(args.source.read_text("utf-8"))
        rows = content.get("long_windows", content)["windows"]
    else:
        device = resolve_device(args.device)
        rows = []
        with tempfile.TemporaryDirectory() as name:
            models = Models(Path(name), device, args.quick, EMBEDDED)
            for case in args.case or CASES:
                lengths = args.lengths or (QUICK if args.quick else LENGTHS)
                rows += rows_of(case, models, lengths, args.most_seconds, device)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        print("\n" + long_table(rows), flush=True)
        write(args.out, device, {"windows": rows})
    if args.curve is not None:
        args.curve.write_text(curve(rows), encoding="utf-8")
        print(f"written to {args.curve}")


if __name__ == "__main__":
    main()
