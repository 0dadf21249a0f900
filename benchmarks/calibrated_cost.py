"""What does `calibrated` cost next to one plain forward of the same model?

    python benchmarks/calibrated_cost.py                            SmolLM2-135M's shape, 8,192 and 32,768 tokens
    python benchmarks/calibrated_cost.py --model embedded           another calculator
    python benchmarks/calibrated_cost.py --depth 0.6 --heads 16     how deep the chosen heads lie, and how many

Plain is what one would run otherwise: transformers' `AutoModel` with SDPA, no logits and no cache. Stopped is
longsift's forward to the deepest chosen layer's queries and keys, with no statistics; calibrated adds these, and is
what `Scorer.measure` takes for one window. SmolLM2's shape has random weights: the time does not depend on them. The
embedded model has its own calibration; for others one is made up for the time's sake where none is given, with heads
spread evenly over the last half of the depth.

Times are medians; the three take turns. On a GPU they are by CUDA events, without the copy of the ids.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from longsift.calculators.checkpoint import locate
from longsift.calculators.full import FullModel
from longsift.methods.calibrated import EMBEDDED, Calibrated, Calibration, Feature, Fit
from longsift.scoring import Scorer, resolve_device
from shapes import random_checkpoint

RESULTS = Path(__file__).parent / "results" / "calibrated_cost.json"
SPAN = 128


def made_up_calibration(model: str, folder: Path, length: int, depth: float, heads: int) -> Path:
    """A calibration of `heads` heads in the global layers of the last half of the first `depth` of the model."""
    whole = FullModel.load(model)
    about = whole.describe()
    deepest = round(depth * len(about["sliding_windows"]))
    seeing = whole.global_layers(length)
    layers = [layer for layer in seeing if deepest // 2 <= layer < deepest] or list(seeing[:1])
    pairs = [(layers[i % len(layers)], i // len(layers)) for i in range(min(heads, len(layers) * about["heads"]))]
    features = tuple(Feature(layer, head, "far", 0.0, 1.0, 1.0) for layer, head in pairs)
    path = folder / f"calibration-{length}.json"
    Calibration(whole.identity(), (Fit(length, SPAN, features),)).write(path)
    return path


def median_times(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                call()
                elapsed = (time.perf_counter() - began) * 1e3
            if turn:
                times[name].append(elapsed)
    return {name: statistics.median(each) for name, each in times.items()}


def measure(
    model: str, calibration: Path, length: int, dtype: torch.dtype, repeats: int, device: torch.device
) -> dict[str, Any]:
    """The three times for one window, in milliseconds, and calibrated / plain."""
    method = Calibrated(str(calibration))
    scorer = Scorer(method, model=model, device=str(device), dtype=str(dtype).removeprefix("torch."))
    calculator = scorer.calculator
    plain = transformers.AutoModel.from_pretrained(locate(model, None).folder, dtype=dtype, attn_implementation="sdpa")
    plain = plain.to(device).eval()
    ids = torch.randint(4, calculator.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    on_device, window = ids.to(device), ids[0].numpy()
    heads = method.loaded.fit_for(length).heads

    @torch.inference_mode()
    def forward() -> None:
        plain(on_device, use_cache=False)

    @torch.inference_mode()
    def stopped() -> None:
        calculator.reduce(on_device, lambda _: None, layers=tuple(heads))

    times = median_times(
        {"plain": forward, "stopped": stopped, "calibrated": lambda: scorer.measure(window)}, repeats, device
    )
    return {
        "tokens": length,
        "layers": sorted(heads),
        "heads": sum(map(len, heads.values())),
        **{f"{name}_ms": round(value, 3) for name, value in times.items()},
        "ratio": round(times["calibrated"] / times["plain"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-shape", help="smollm2-shape, embedded, a folder or a hub id")
    parser.add_argument(
        "--calibration", type=Path, help="a file of `longsift calibrate`; the shipped one for embedded, else made up"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--depth", type=float, default=0.6, help="share of the layers that the forward needs")
    parser.add_argument("--heads", type=int, default=16, help="chosen heads")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model
        if model == "smollm2-shape":
            model = str(random_checkpoint(folder / "model", "smollm2-135m", device))
        rows = []
        print(f"{'tokens':>7} {'heads':>6} {'plain ms':>10} {'stopped ms':>11} {'calibrated ms':>14} {'ratio':>7}")
        for length in arguments.lengths:
            shipped = EMBEDDED if model == "embedded" else None
            calibration = (
                arguments.calibration
                or shipped
                or made_up_calibration(model, folder, length, arguments.depth, arguments.heads)
            )
            row = measure(model, calibration, length, dtype, arguments.repeats, device)
            rows.append(row)
            print(
                f"{length:7} {row['heads']:6} {row['plain_ms']:10.2f} {row['stopped_ms']:11.2f} "
                f"{row['calibrated_ms']:14.2f} {row['ratio']:7.3f}"
            )
    result = {
        "model": arguments.model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
