"""What the benchmarks share: times, floors of a machine, facts about it, tables and result files.

Times on a GPU are between CUDA events, after calls that are not counted; on a CPU by the clock. A time is the median of
its repeats, with the least and the largest beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import longsift

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 256 << 20  # several times the last-level cache of any GPU there is
SECONDS = 0.4  # of repeats of one measurement


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median, the least and the largest of `repeats`."""

    ms: float
    low_ms: float
    high_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{_significant(self.ms)} ({_significant(self.low_ms)}–{_significant(self.high_ms)})"


def time_calls(
    call: Callable[[int], object], device: torch.device, *, warm_up: int = 2, least: int = 3, most: int = 30
) -> Timing:
    """Time `call(turn)`, which is given another number each time, so that it can take other inputs."""
    for turn in range(max(warm_up, 1)):
        once = _milliseconds(call, turn, device)
    repeats = max(least, min(most, round(SECONDS * 1e3 / max(once, 1e-3))))
    times = [_milliseconds(call, warm_up + turn, device) for turn in range(repeats)]
    return Timing(statistics.median(times), min(times), max(times), repeats)


def _milliseconds(call: Callable[[int], object], turn: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call(turn)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    call(turn)
    return (time.perf_counter() - began) * 1e3


def input_sets(make: Callable[[int], tuple[torch.Tensor, ...]], device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """Inputs of several seeds, so many that no cache of a GPU holds them from one turn to the next."""
    first = make(0)
    if device.type != "cuda":
        return [first]
    size = sum(tensor.nbytes for tensor in first)
    return [first, *(make(seed) for seed in range(1, max(2, math.ceil(CACHE_BYTES / size))))]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Call, and tell the largest GPU memory that was held, all tensors of the process counted; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices of random numbers."""
    sets = [tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2)) for _ in range(2)]
    timing = time_calls(lambda turn: torch.mm(*sets[turn % 2]), device)
    return 2 * size**3 / (timing.ms * 1e-3)


def exponential_rate(device: torch.device) -> float:
    """Exponentials a second, of numbers that stay in registers (a GPU) or in a core's cache, of all threads (a CPU)."""
    if device.type == "cuda":
        from exponentials import count, exponentials

        values = torch.rand(1 << 22, device=device)
        timing = time_calls(lambda _: exponentials(values), device)
        return count(values) / (timing.ms * 1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values, result = torch.rand(1 << 16), torch.empty(1 << 16)
    timing = time_calls(lambda _: torch.exp(values, out=result), device)
    torch.set_num_threads(threads)
    return threads * values.numel() / (timing.low_ms * 1e-3)


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine and its software."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "tokenizers")},
        "longsift": longsift.__version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
            **facts,
        }
    return facts


def slug(facts: dict[str, Any]) -> str:
    """A name for files of this machine's results: "h100-80gb-hbm3", "h200-x2", "cpu"."""
    if "gpu" not in facts:
        return "cpu"
    name = facts["gpu"].removeprefix("NVIDIA ").removeprefix("AMD ").lower().replace(" ", "-")
    return name if facts["gpus"] == 1 else f"{name}-x{facts['gpus']}"


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flags.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    flags.add_argument("--out", type=Path, help="file for the figures, JSON")
    return flags


def write(out: Path | None, device: torch.device, results: dict[str, Any]) -> None:
    """Write the figures with the machine and the command that made them."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "command": command(), **results}
    out.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    print(f"written to {out}")


def command() -> str:
    """The command line of this process, as one would type it in the project's folder."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns are aligned; floats get three digits, None a dash."""
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return _significant(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _significant(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _plain(value: object) -> object:
    if isinstance(value, Timing):
        return asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
