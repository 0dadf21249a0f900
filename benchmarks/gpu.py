"""Run all benchmarks of a GPU machine and write their figures and what they say of the targets.

    python benchmarks/gpu.py                       benchmarks/results/<gpu>.json and <gpu>.md
    python benchmarks/gpu.py --only long_windows   one program anew; the figures of the others stay
    python docs/make_performance.py                then: the tables of the README and docs/performance.md

Each program runs in a process of its own, so that none finds the memory of another in use. One that fails is told, the
others go on, and the exit code is 1. On a machine with several GPUs only that is measured which they change: the same
windows scored on one GPU, on two, and so on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention_kernels
import long_windows
import throughput as throughput_program
from longsift.scoring import resolve_device
from measuring import RESULTS, command, machine, parser, slug, table

HERE = Path(__file__).parent
PROGRAMS: dict[str, list[str]] = {
    "attention_kernels": [],
    "throughput": [],
    "long_windows": ["--most-seconds", "12"],
    "calibrated_cost": ["--lengths", "8192", "32768", "--repeats", "7"],
}
SEVERAL_GPUS: dict[str, list[str]] = {
    "throughput": ["--part", "ids", "--part", "workers", "--case", "longattn-8b"],
}
QUICK: dict[str, list[str]] = {
    "attention_kernels": ["--quick", "--layer", "smollm2"],
    "throughput": ["--quick", "--case", "longattn-8b", "--case", "longattn-8b-sampled", "--part", "ids"],
    "long_windows": ["--quick", "--case", "ladm-layer"],
}
SECONDS_OF_ONE = 300  # after which a program is stopped


@dataclass(frozen=True)
class Target:
    """A figure to reach: at most `reach` (and better `aim`), or at least where `least`."""

    what: str
    unit: str
    reach: float
    aim: float | None = None
    least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.reach if self.least else value <= self.reach


TARGETS = {
    "longattn-8b statistics": Target("LongAttn statistics, 8B layer", "ms", 9, 7),
    "longattn-70b statistics": Target("LongAttn statistics, 70B layer", "ms", 18.5, 14),
    "longattn-8b window": Target("LongAttn 8B, ids → score, whole path", "ms", 11, 8),
    "longattn-8b against published": Target(
        "LongAttn 8B, ids → score, against the published way", "×", 230, least=True
    ),
    "longattn-8b text": Target("LongAttn 8B, text → scores", "M tokens/s", 2.0, 3.5, least=True),
    "longattn-8b sampled": Target("LongAttn 8B, query fraction 1/8, ids → score", "M tokens/s", 12, least=True),
    "sampled spearman": Target("query fraction 1/8, Spearman with exact", "", 0.99, least=True),
    "ladm window": Target("LADM TinyLlama, published strides", "ms", 400, 330),
    "ladm-dense window": Target("LADM TinyLlama, dense", "ms", 520, 400),
    "ladm against published": Target(
        "LADM TinyLlama, published strides, against the published way", "×", 3, least=True
    ),
    "calibrated ratio": Target("calibrated, SmolLM2-135M's shape, against its plain forward", "×", 0.75, 0.6),
    "strength error": Target("error of DS against float64", "relative", 1e-4),
    "variance error": Target("error of Var against float64", "relative", 1e-3),
    "cds error": Target("error of CDS against float64", "relative", 1e-3),
    "two gpus": Target("two GPUs on one host", "× one", 1.9, least=True),
    "long seconds": Target("1,048,576 tokens, LongAttn 8B", "s", 12),
    "long memory": Target("1,048,576 tokens, LongAttn 8B", "GiB", 20),
}


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The figure of every target that the results hold, by the target's key, at 32,768 tokens; the worst of several."""
    found: dict[str, float] = {}
    kernels = results.get("attention_kernels", {})
    for row in kernels.get("kernels", ()):
        if row["measure"] == "far statistics" and row["length"] == 32_768 and row["dtype"] == "bfloat16":
            found[f"{row['layer']} statistics"] = row["ms"]
    for key, names in {"strength": ("strength",), "variance": ("variance",), "cds": ("CDS",)}.items():
        values = [
            value
            for row in kernels.get("errors", ())
            for name, value in row["errors"].items()
            if name.startswith(names)
        ]
        if values:
            found[f"{key} error"] = max(values)
    throughput = results.get("throughput", {})
    published = {row["case"]: row["ms"] for row in kernels.get("published", ()) if row["length"] == 32_768}
    for row in throughput.get("ids", ()):
        if row["length"] != 32_768:
            continue
        if row["name"] in ("longattn-8b", "ladm", "ladm-dense"):
            found[f"{row['name']} window"] = row["ms"]
        if row["name"] == "longattn-8b-sampled":
            found["longattn-8b sampled"] = row["tokens_per_s"] / 1e6
    for name, cases in {
        "longattn-8b": ("LongAttn, Llama-3.1-8B",),
        "ladm": ("LADM, TinyLlama-1.1B", "LADM, TinyLlama-1.1B, a batch of 4"),
    }.items():
        times = [published[case] for case in cases if case in published]
        if times and f"{name} window" in found:
            found[f"{name} against published"] = min(times) / found[f"{name} window"]
    for row in throughput.get("sampled", ()):
        if row["length"] == 32_768:
            found["sampled spearman"] = min(row["spearman"]["score"], found.get("sampled spearman", 1.0))
    for row in throughput.get("text", ()):
        if row["name"] == "longattn-8b" and row["length"] == 32_768:
            found["longattn-8b text"] = row["running_tokens_per_s"] / 1e6
    rates = {row["workers"]: row["tokens_per_s"] for row in throughput.get("workers", ())}
    if rates.get(1) and rates.get(2):
        found["two gpus"] = rates[2] / rates[1]
    for row in results.get("long_windows", {}).get("windows", ()):
        if row["name"] == "longattn-8b" and row["length"] == 1 << 20:
            found["long seconds"] = row["seconds"]
            if row["peak_bytes"] is not None:
                found["long memory"] = row["peak_bytes"] / 2**30
    for row in results.get("calibrated_cost", {}).get("rows", ()):
        if row["tokens"] == 32_768:
            found["calibrated ratio"] = row["ratio"]
    return found


def target_table(results: dict[str, Any]) -> str:
    """What was measured of the targets, whether each is met, and which were not measured."""
    found = figures(results)
    rows, missing = [], []
    for key, target in TARGETS.items():
        sign = "≥" if target.least else "≤"
        aim = None if target.aim is None else f"{sign} {target.aim:g}"
        if key in found:
            reach = f"{sign} {target.reach:g} {target.unit}".strip()
            rows.append((target.what, reach, aim, _number(found[key]), "yes" if target.met(found[key]) else "**no**"))
        else:
            missing.append(f"{target.what} ({target.unit})" if target.unit else target.what)
    told = f"\n\nNot measured in this run: {'; '.join(missing)}." if missing else ""
    return table(("", "reach", "aim", "measured", "reached"), rows) + told


def _number(value: float) -> str:
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table of the results, by its title, anew from the figures."""
    kernels, throughput = results.get("attention_kernels", {}), results.get("throughput", {})
    long_rows = results.get("long_windows", {}).get("windows")
    costs = results.get("calibrated_cost", {}).get("rows")
    parts = {
        "Statistics of one layer": (attention_kernels.kernel_table, kernels.get("kernels")),
        "The published way": (attention_kernels.published_table, kernels.get("published")),
        "Errors against float64": (attention_kernels.error_table, kernels.get("errors")),
        "Ids to scores": (throughput_program.ids_table, throughput.get("ids")),
        "Text to scores": (throughput_program.text_table, throughput.get("text")),
        "Sampled queries": (throughput_program.sampled_table, throughput.get("sampled")),
        "Several GPUs": (throughput_program.worker_table, throughput.get("workers")),
        "Long windows": (long_windows.long_table, long_rows),
        "calibrated next to one plain forward of SmolLM2-135M's shape": (cost_table, costs),
    }
    return {title: make(rows) for title, (make, rows) in parts.items() if rows}


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """What calibrated costs; see calibrated_cost.py."""
    names = ("tokens", "heads", "plain_ms", "stopped_ms", "calibrated_ms", "ratio")
    return table([name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows])


def page(results: dict[str, Any]) -> str:
    """The Markdown page of a run."""
    facts = results["machine"]
    about = table(("", ""), [(name.replace("_", " "), value) for name, value in facts.items() if value is not None])
    parts = {"Targets": target_table(results), **tables(results)}
    rates = results.get("attention_kernels", {}).get("rates")
    if rates:
        told = [f"{rate / 1e12:.3g} T/s {name.removeprefix('torch.')}" for name, rate in rates.items()]
        parts = {
            "Rates of this machine": f"FLOP/s of a matrix product, exponentials a second: {', '.join(told)}."
        } | parts
    sections = "\n".join(f"## {title}\n\n{text}\n" for title, text in parts.items())
    return f"# Benchmarks on {facts.get('gpu', facts['cpu'])}\n\n`{results['command']}`\n\n{about}\n\n{sections}"


def run_program(name: str, flags: Sequence[str], device: str, folder: Path) -> dict[str, Any] | None:
    """Run one program in a process of its own; its figures, or None when it failed."""
    out = folder / f"{name}.json"
    arguments = [sys.executable, str(HERE / f"{name}.py"), "--device", device, "--out", str(out), *flags]
    began = time.perf_counter()
    print(f"\n## {name} {' '.join(flags)}", flush=True)
    try:
        code = subprocess.run(arguments, timeout=SECONDS_OF_ONE).returncode
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.perf_counter() - began
    print(f"{name}: {seconds:.0f} s, {'stopped' if code is None else f'exit code {code}'}", flush=True)
    if code != 0 or not out.exists():
        return None
    content = json.loads(out.read_text("utf-8")) | {"seconds": round(seconds, 1)}
    return {key: value for key, value in content.items() if key not in ("machine", "command")}


def save(results: dict[str, Any], json_file: Path) -> None:
    """Write the figures and their page; after each program, so that a later one cannot take them along."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    json_file.with_suffix(".md").write_text(page(results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser(__doc__)
    flags.set_defaults(out=RESULTS)
    flags.add_argument("--only", choices=PROGRAMS, action="append", help="only this program; may be repeated")
    args = flags.parse_args(arguments)
    device = resolve_device(args.device)
    facts = machine(device)
    json_file = args.out / f"{slug(facts)}.json"
    results: dict[str, Any] = json.loads(json_file.read_text("utf-8")) if args.only and json_file.exists() else {}
    results |= {"machine": facts, "command": command()}
    failed = []
    programs = QUICK if args.quick else PROGRAMS if facts.get("gpus", 1) == 1 else SEVERAL_GPUS
    with tempfile.TemporaryDirectory() as name:
        for program, own in programs.items():
            if args.only and program not in args.only:
                continue
            content = run_program(program, own, args.device, Path(name))
            if content is None:
                failed.append(program)
            else:
                results[program] = content
                save(results, json_file)
    save(results, json_file)
    print(f"\n{target_table(results)}\n\nwritten to {json_file} and {json_file.with_suffix('.md')}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
