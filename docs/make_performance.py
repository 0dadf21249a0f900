"""Write the tables of docs/performance.md and the README, and the curve, from benchmarks/results/<gpu>.json.

`python docs/make_performance.py`; a test fails when they are out of date. Results are those of benchmarks/gpu.py, of
any number of machines; the README shows the first by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README, CURVE = ROOT / "docs" / "performance.md", ROOT / "README.md", ROOT / "docs" / "long-windows.svg"
BEGIN, END = "<!-- tables: docs/make_performance.py -->\n", "<!-- end of tables -->\n"

# The published way that a case of throughput.py is compared with
PUBLISHED = {
    "longattn-8b": "LongAttn, Llama-3.1-8B",
    "longattn-70b": "LongAttn, Llama-3.1-70B",
    "ladm": "LADM, TinyLlama-1.1B, a batch of 4",
}

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from curve import curve  # noqa: E402
from measuring import table  # noqa: E402


def runs() -> dict[str, dict[str, Any]]:
    """The runs of benchmarks/gpu.py that are on record, by file name."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: run for name, run in found.items() if "gpu" in run.get("machine", {})}


def write(page: str, text: str) -> str:
    """The page with the text between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the line {BEGIN!r} or {END!r}")
    return before + BEGIN + text + END + after


def performance(known: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/performance.md."""
    parts = []
    for name, run in known.items():
        facts = run["machine"]
        parts.append(f"## {_machine(facts)}\n")
        versions = ", ".join(f"{part} {facts[part]}" for part in ("torch", "triton", "transformers", "driver"))
        parts.append(
            f"{versions}; {facts['cores']} cores; {facts['when'][:10]}; `{run['command']}` "
            f"([figures](../benchmarks/results/{name}.json)).\n"
        )
        rates = run.get("attention_kernels", {}).get("rates", {})
        told = [f"{rate / 1e12:.3g} T/s {kind.removeprefix('torch.')}" for kind, rate in rates.items()]
        if told:
            parts.append(f"Rates, FLOP of a matrix product and exponentials: {', '.join(told)}.\n")
        parts.append(f"### Targets\n\n{gpu.target_table(run)}\n")
        parts += [f"### {title}\n\n{text}\n" for title, text in gpu.tables(run).items()]
        if run is _with_long_windows(known):
            parts.append("![Seconds and memory of a window by its length](long-windows.svg)\n")
    if not parts:
        return "\nNo run of a GPU machine is on record.\n\n"
    return "\n" + "\n".join(parts) + "\n"


def summary(known: dict[str, dict[str, Any]]) -> str:
    """The table of the README: one window, next to the published way."""
    if not known:
        return ""
    run = next(iter(known.values()))
    kernels, throughput = run.get("attention_kernels", {}), run.get("throughput", {})
    published = {row["case"]: row["ms"] for row in kernels.get("published", ())}
    rows = []
    for row in throughput.get("ids", ()):
        before = published.get(PUBLISHED.get(row["name"], ""))
        faster = None if before is None else f"{before / row['ms']:.3g}×"
        rows.append((row["case"], before, row["ms"], faster, f"{row['tokens_per_s']:,.0f}"))
    said = (
        f"One window of 32,768 tokens on one {run['machine']['gpu']}, from ids to scores, with the published way "
        "measured beside it ([docs/performance.md](docs/performance.md)):"
    )
    headers = ("", "published way, ms", "longsift, ms", "faster", "tokens/s")
    return f"\n{said}\n\n{table(headers, rows)}\n{_sentences(known)}\n"


def _sentences(known: dict[str, dict[str, Any]]) -> str:
    """What else the README says of the runs."""
    said = []
    for run in known.values():
        found, facts = gpu.figures(run), run["machine"]
        if "ladm against published" in found:
            said.append(
                "LADM's published way is written anew here; its authors' code took 1,230 ms on another H100 "
                f"({1230 / found['ladm window']:.1f}×)."
            )
        if "longattn-8b text" in found:
            rate = f"{found['longattn-8b text']:.1f} M tokens/s once it runs"
            said.append(f"From text to scores, LongAttn 8B on {facts['cores']} CPU cores and one GPU: {rate}.")
        if "long seconds" in found and "long memory" in found:
            took = f"{found['long seconds']:.1f} s and {found['long memory']:.1f} GiB"
            said.append(f"A window of 1,048,576 tokens takes {took}.")
        if "two gpus" in found:
            said.append(
                f"Two {facts['gpu'].removeprefix('NVIDIA ')} score {found['two gpus']:.2f} times as fast as one."
            )
    return "\n" + " ".join(said) + "\n" if said else ""


def _machine(facts: dict[str, Any]) -> str:
    return facts["gpu"] if facts["gpus"] == 1 else f"{facts['gpus']} × {facts['gpu']}"


def picture(known: dict[str, dict[str, Any]]) -> str | None:
    """The picture of the long windows, of the first machine that measured them."""
    run = _with_long_windows(known)
    return None if run is None else curve(run["long_windows"]["windows"])


def _with_long_windows(known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((run for run in known.values() if "long_windows" in run), None)


def main() -> None:
    known = runs()
    PAGE.write_text(write(PAGE.read_text("utf-8"), performance(known)), encoding="utf-8")
    README.write_text(write(README.read_text("utf-8"), summary(known)), encoding="utf-8")
    drawn = picture(known)
    if drawn is not None:
        CURVE.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
