"""How far a run is, and what this machine can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from longsift.errors import OutputError
from longsift.shards import RunFolder


def run_status(out: Path) -> dict[str, Any]:
    """The state of a run, read from its manifest and shard records; safe while the run goes on.

    Raises:
        OutputError: the folder holds no run.
    """
    folder = RunFolder(out)
    manifest = folder.manifest()
    if not manifest:
        raise OutputError(f"{out} holds no run of longsift.")
    state: dict[str, Any] = {"folder": str(out)}
    windows = manifest.get("windows")
    if windows:
        records: Collection[dict[str, Any]] = folder.records("windows").values()
        names = ("documents", "bad_rows", "too_short", "windows", "tokens")
        done = windows["status"] == "done"
        counts = windows["counts"] if done else _sums(records, *names)
        state["windows"] = {
            "state": windows["status"],
            "sources done": len(records),
            "sources": len(windows["identity"]["inputs"]),
            **{name: counts[name] for name in names},
        }
        if "folder" in windows:
            state["windows"] = {
                "state": "done",
                "taken from": windows["folder"],
                **{n: counts[n] for n in names},
            }
    scores = manifest.get("scores")
    if scores:
        records = folder.records("scores").values()
        sums = _sums(records, "windows", "failed", "tokens", "seconds")
        total = windows["counts"]["tokens"] if windows and windows["status"] == "done" else None
        speed = sums["tokens"] / sums["seconds"] if sums["seconds"] else None
        left = (total - sums["tokens"]) / speed if speed and total is not None else None
        state["scores"] = {
            "state": scores["status"],
            "method": scores["identity"]["method"],
            "shards done": len(records),
            "shards": len(list(folder.windows.glob("*.parquet"))),
            "windows": sums["windows"],
            "failed": sums["failed"],
            "tokens": sums["tokens"],
            "tokens in all": total,
            "tokens per second": speed,
            "seconds left": left if scores["status"] != "done" else 0.0,
            "since the last shard, seconds": _age(folder, "scores") if scores["status"] != "done" else None,
        }
    selected = manifest.get("selected")
    if selected:
        state["selected"] = {"state": selected["status"], **selected["identity"]}
    return state


def _sums(records: Collection[dict[str, Any]], *names: str) -> dict[str, Any]:
    return {name: sum(record[name] for record in records) for name in names}


def _age(folder: RunFolder, stage: str) -> float | None:
    times = [path.stat().st_mtime for path in (folder.path / "shards" / stage).glob("*.json")]
    return time.time() - max(times) if times else None


def machine() -> dict[str, Any]:
    """Devices, backends and libraries of this machine, as longsift would use them."""
    import torch

    from longsift import __version__
    from longsift.calculators.checkpoint import locate

    gpus = [
        {
            "gpu": f"cuda:{i}",
            "name": torch.cuda.get_device_name(i),
            "memory GiB": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    libraries = (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "pyarrow",
        "duckdb",
        "fsspec",
        "datasets",
        "s3fs",
    )
    return {
        "longsift": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"cuda ({len(gpus)})" if gpus else "cpu: PyTorch sees no GPU",
        "attention backend": "Triton for spans, blockwise PyTorch for the rest"
        if gpus and importlib.util.find_spec("triton")
        else "blockwise PyTorch",
        "embedded calculator": str(locate("embedded").name),
        "libraries": {name: _version(name) for name in libraries},
        "gpus": gpus,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
