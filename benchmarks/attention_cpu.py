"""How fast and how small are the blockwise attention measures on a CPU, next to the published way and the floor?

    python benchmarks/attention_cpu.py                 the table, and benchmarks/results/attention_cpu.json
    python benchmarks/attention_cpu.py --length 2048   a quick look

The published way holds the map: for every head a length × length matrix of probabilities (LongAttn), or for every
span of queries a heads × span × keys one (LADM), with the keys of grouped heads repeated. Both ways run in one
process, in turn, so that a disturbance of the machine meets both; the table shows medians, and the ratio by CPU time,
which other processes disturb less. Peak memory is that of a fresh process, less what it held with the inputs in place.
The floor is the time of the unavoidable arithmetic alone at the best rates of this run: the QKᵀ products of the visible
pairs, then one exponential each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from longsift.attention import far_statistics, span_focus

RESULTS = Path(__file__).parent / "results" / "attention_cpu.json"
SPAN = 128


@dataclass(frozen=True)
class Case:
    """One layer shape and the two ways of measuring it, each (q, k) -> values."""

    title: str
    heads: int
    kv_heads: int
    head_dim: int
    ours: Callable[[Tensor, Tensor], Tensor]
    published: Callable[[Tensor, Tensor], Tensor]
    visible_pairs: Callable[[int], int]  # length -> query-key pairs that every head must evaluate

    def inputs(self, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, self.heads, length, self.head_dim, generator=generator)
        k = torch.randn(1, self.kv_heads, length, self.head_dim, generator=generator)
        return q, k


def ladm_query_spans(length: int) -> list[int]:
    """The query spans of LADM's default strides (d_AFS = d_CDS = 4), last first; `length` is a multiple of 128."""
    interval = stride = 4 * SPAN
    starts = range(length - SPAN, SPAN + 4 * interval, -stride)
    return [start // SPAN for start in starts]


def longattn_ours(q: Tensor, k: Tensor) -> Tensor:
    measured = far_statistics(q, k, q.shape[2] // 4)
    return torch.stack((measured.strength[0], measured.variance[0]))


def longattn_published(q: Tensor, k: Tensor) -> Tensor:
    heads, length, head_dim = q.shape[1:]
    keys = k.repeat_interleave(heads // k.shape[1], dim=1)
    position = torch.arange(length)
    behind = position[:, None] - position[None, :]
    mask = torch.zeros(length, length).masked_fill_(behind < 0, -torch.inf)
    near = behind < length // 4
    del behind
    values = []
    for head in range(heads):
        logits = q[0, head] @ keys[0, head].T * head_dim**-0.5
        logits = logits + mask
        p = torch.softmax(logits, dim=-1)
        far = p.masked_fill(near, 0.0)
        values.append(torch.stack((far.sum() / length, far.var())))
    return torch.stack(values, 1)


def ladm_ours(q: Tensor, k: Tensor) -> Tensor:
    return span_focus(q, k, SPAN, query_spans=ladm_query_spans(q.shape[2]), average_heads=True)[0]


def ladm_published(q: Tensor, k: Tensor) -> Tensor:
    heads, length, head_dim = q.shape[1:]
    keys = k.repeat_interleave(heads // k.shape[1], dim=1)
    chosen = ladm_query_spans(length)
    focus = torch.zeros(len(chosen), length // SPAN)
    for i, j in enumerate(chosen):
        start = j * SPAN
        logits = q[0, :, start : start + SPAN] @ keys[0, :, :start].transpose(1, 2) * head_dim**-0.5
        mass = torch.softmax(logits, dim=-1).mean(0).sum(0)
        focus[i, :j] = mass.view(j, SPAN).sum(1)
    return focus


CASES = {
    "longattn": Case(
        "LongAttn statistics, Llama-3.1-8B first layer",
        32,
        8,
        128,
        longattn_ours,
        longattn_published,
        lambda length: length * (length + 1) // 2,
    ),
    "ladm": Case(
        "LADM spans at default strides, SmolLM2-135M layer",
        9,
        3,
        64,
        ladm_ours,
        ladm_published,
        lambda length: sum(SPAN * SPAN * j for j in ladm_query_spans(length)),
    ),
}


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all cores together that this process worked."""
    started, worked = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - worked


def best_rates(threads: int) -> tuple[float, float]:
    """Float32 products (FLOP/s) and exponentials (1/s): the best of one core in its cache, times the threads."""
    torch.set_num_threads(1)
    a, b, c = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    product = min(seconds(lambda: torch.mm(a, b, out=c))[0] for _ in range(300))
    exponentials = min(seconds(lambda: torch.exp(a, out=c))[0] for _ in range(1000))
    torch.set_num_threads(threads)
    return threads * 2 * 512**3 / product, threads * 512**2 / exponentials


def peak_memory(case: str, way: str, length: int, threads: int) -> int:
    """Bytes that one measurement adds to a fresh process that holds the inputs."""
    command = [sys.executable, __file__, "--peak-of", case, way, "--length", str(length), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(case: Case, way: str, length: int) -> None:
    q, k = case.inputs(length)
    measure = case.ours if way == "ours" else case.published
    before = resident_bytes("VmRSS")
    measure(q, k)
    print(resident_bytes("VmHWM") - before)


def resident_bytes(key: str) -> int:
    """Resident memory now ("VmRSS") or at its peak ("VmHWM"); unlike ru_maxrss not inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def compare(name: str, length: int, rounds: int, threads: int) -> dict[str, object]:
    case = CASES[name]
    q, k = case.inputs(length)
    ours, published = case.ours(q, k), case.published(q, k)  # both warm, and the same numbers
    difference = ((ours - published).abs() / published.abs().clamp(min=1e-30)).max()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "published": []}
    for _ in range(rounds):
        times["published"].append(seconds(lambda: case.published(q, k)))
        times["ours"].append(seconds(lambda: case.ours(q, k)))
        times["ours"].append(seconds(lambda: case.ours(q, k)))
    flops, exponentials = best_rates(threads)
    pairs = case.heads * case.visible_pairs(length)
    ours_s, published_s = (statistics.median(wall for wall, _ in times[way]) for way in ("ours", "published"))
    ours_cpu, published_cpu = (statistics.median(cpu for _, cpu in times[way]) for way in ("ours", "published"))
    products_s, exponentials_s = 2 * case.head_dim * pairs / flops, pairs / exponentials
    memory = {way: peak_memory(name, way, length, threads) for way in times}
    return {
        "case": case.title,
        "length": length,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "seconds": {"ours": ours_s, "published": published_s},
        "cpu_seconds": {"ours": ours_cpu, "published": published_cpu},
        "all_wall_and_cpu_seconds": times,
        "speed_up": published_s / ours_s,
        "cpu_speed_up": published_cpu / ours_cpu,
        "floor_seconds": {"products": products_s, "exponentials": exponentials_s},
        "times_the_floor": ours_s / (products_s + exponentials_s),
        "rates": {"float32_flop_per_s": flops, "exponentials_per_s": exponentials},
        "peak_bytes": memory,
        "memory_ratio": memory["published"] / max(memory["ours"], 1),
        "largest_relative_difference": float(difference),
    }


def machine(threads: int) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_table(results: list[dict[str, object]]) -> None:
    columns = ("published", "ours", "speed-up", "by CPU time", "floor", "× floor", "peak published", "ours", "ratio")
    print(f"{'':52}" + "".join(f"{column:>16}" for column in columns))
    for result in results:
        times, peak, floor = result["seconds"], result["peak_bytes"], result["floor_seconds"]
        assert isinstance(times, dict)
        assert isinstance(peak, dict)
        assert isinstance(floor, dict)
        cells = (
            f"{times['published']:.3f} s",
            f"{times['ours']:.3f} s",
            f"{result['speed_up']:.1f}×",
            f"{result['cpu_speed_up']:.1f}×",
            f"{sum(floor.values()):.3f} s",
            f"{result['times_the_floor']:.2f}",
            f"{peak['published'] / 2**20:.0f} MiB",
            f"{peak['ours'] / 2**20:.0f} MiB",
            f"{result['memory_ratio']:.0f}×",
        )
        print(f"{result['case']:52}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the window, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the published way; ours runs twice in each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the numbers go")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.length % SPAN or not ladm_query_spans(args.length):
        parser.error(f"--length must be a multiple of {SPAN}, and at least {SPAN * 19}")
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(CASES[args.peak_of[0]], args.peak_of[1], args.length)
        return
    facts = machine(args.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = [compare(name, args.length, args.rounds, args.threads) for name in args.case or CASES]
    print_table(results)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
