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
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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


def curve(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG of seconds by length, both on logarithmic scales."""
    width, height, left, right, top, bottom = 720, 400, 60, 250, 20, 40
    lengths = sorted({row["length"] for row in rows})
    seconds = [row["seconds"] for row in rows]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))

    def x(length: int) -> float:
        span = math.log2(lengths[-1] / lengths[0]) or 1.0
        return left + math.log2(length / lengths[0]) / span * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (math.log10(value) - low) / ((high - low) or 1) * (height - top - bottom)

    colors = ("#0b6e99", "#d9730d", "#0f7b6c", "#6940a5", "#ad1a72")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for power in range(low, high + 1):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power:g} s</text>'
        )
    for length in lengths:
        parts.append(
            f'<text x="{x(length):.1f}" y="{height - bottom + 18}" text-anchor="middle">'
            f"{f'{length // 1024}K' if length < 1 << 20 else f'{length >> 20}M'}</text>"
        )
    for color, name in zip(colors, dict.fromkeys(row["name"] for row in rows), strict=False):
        points = [(x(row["length"]), y(row["seconds"])) for row in rows if row["name"] == name]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points]
        title = next(row["case"] for row in rows if row["name"] == name)
        slot = list(dict.fromkeys(row["name"] for row in rows)).index(name)
        parts.append(f'<text x="{width - right + 14}" y="{top + 14 + 18 * slot}" fill="{color}">{title}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">tokens of a window</text></svg>'
    )
    return "\n".join(parts) + "\n"


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
