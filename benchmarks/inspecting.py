"""How long does `longsift inspect` take for one window, in how much memory, and how large is its page?

    python benchmarks/inspecting.py                    32,768 tokens, with the embedded calculator, on a CPU
    python benchmarks/inspecting.py --length 8192

The text is Python's own library. The command runs in a process of its own, from its start to the written page: seconds
by the clock, seconds of the cores, the largest resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longsift.scoring import resolve_device
from measuring import parser, table, write
from shapes import library_documents

LENGTH, QUICK_LENGTH = 32_768, 2_048
CHARACTERS_A_TOKEN = 8  # more than any text of the library has


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    flags = parser(__doc__ or "")
    flags.add_argument("--length", type=int, help=f"tokens of the window [{LENGTH:,}]")
    asked = flags.parse_args(arguments)
    device = resolve_device(asked.device)
    length = asked.length or (QUICK_LENGTH if asked.quick else LENGTH)
    result = inspect(length, str(device))
    print(table(list(result), [list(result.values())]))
    write(asked.out, device, {"inspect": result, "load_at_the_end": os.getloadavg()[0]})


def inspect(length: int, device: str) -> dict[str, Any]:
    """One run of the command; its peak of memory is that of the largest process that this one has waited for."""
    with tempfile.TemporaryDirectory(prefix="longsift-inspecting-") as folder:
        text, page = Path(folder) / "library.txt", Path(folder) / "page.html"
        documents = library_documents(CHARACTERS_A_TOKEN * length)
        text.write_text("".join(document["text"] for document in documents), "utf-8")
        command = [sys.executable, "-m", "longsift", "inspect", text, "-o", page, "--json"]
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        flags = ["--window", str(length), "--device", device]
        numbers = json.loads(subprocess.run([*command, *flags], check=True, stdout=subprocess.PIPE).stdout)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "tokens": numbers["tokens"],
            "passages": len(numbers["passages"]),
            "seconds": seconds,
            "core_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_memory_gb": after.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
            "page_bytes": page.stat().st_size,
        }


if __name__ == "__main__":
    main()
