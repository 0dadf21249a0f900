"""How far a run is, and what this machine can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longsift.errors import OutputError
from longsift.jobs import failed_tasks, tasks_at_work
from longsift.shards import RunFolder
from longsift.tables import parquet_files

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_ERROR = 1e-3  # relative, of a measure that doctor takes for right


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
    # Jobs of a cluster hold no lock; whether they go on is for its own tools to say.
    going_on = folder.is_being_written() or (folder.path / "jobs").exists()

    def stage_state(status: str) -> str:
        return "stopped" if status == "running" and not going_on else status

    windows = manifest.get("windows", {})
    done = windows.get("status") == "done"
    working = [shard for task in tasks_at_work(out) for shard in task["shards"]]
    if windows:
        records: Collection[dict[str, Any]] = folder.records("windows").values()
        names = ("documents", "bad_rows", "too_short", "windows", "tokens")
        begun = folder.places()
        counts = (
            windows["counts"] if done else _sums([*records, *(place["record"] for place in begun.values())], *names)
        )
        state["windows"] = {
            "state": stage_state(windows["status"]),
            "pieces done": len(records),
            "pieces": len(folder.pieces()),
            "sources": len(windows["identity"]["inputs"]),
            "pieces running": [] if done else working or (list(begun) if folder.is_being_written() else []),
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
        total = windows["counts"]["tokens"] if done else None
        speed = sums["tokens"] / sums["seconds"] if sums["seconds"] else None
        now = folder.noted()
        aside = folder.shards_set_aside()
        left = (total - sums["tokens"] - now.get("tokens", 0)) / speed if speed and total is not None else None
        state["scores"] = {
            "state": stage_state(scores["status"]),
            "method": scores["identity"]["method"],
            "shards done": len(records),
            "shards": len(parquet_files(folder.windows)),
            "shards running": now.get("shards") or (working if done else []),
            "shards set aside": len(aside),
            "windows": sums["windows"],
            "failed": sums["failed"],
            "tokens": sums["tokens"],
            "tokens in all": total,
            "tokens per second": speed,
            "seconds left": left if scores["status"] == "running" else 0.0,
            "since the last shard, seconds": _age(folder, "scores") if scores["status"] == "running" else None,
            "process": now.get("process"),
            "set aside": [{"shard": shard, "reason": reason} for shard, reason in aside.items()],
        }
    if failed := failed_tasks(out):
        state["failed tasks"] = failed
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
    """Devices, backends and libraries of this machine, as longsift would use them; the backends are tried out."""
    import torch

    from longsift import __version__
    from longsift.calculators.checkpoint import locate

    count = torch.cuda.device_count()
    gpus = [_gpu(i) for i in range(count)]
    libraries = (
        "torch",
        "triton",
        "transformers",
        "tokenizers",
        "safetensors",
        "pyarrow",
        "duckdb",
        "fsspec",
        "datasets",
        "s3fs",
    )
    platform_of_gpus = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "longsift": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"cuda ({count}), {platform_of_gpus}" if gpus else "cpu: PyTorch sees no GPU",
        "processes that score": max(count, 1),
        "embedded calculator": str(locate("embedded").name),
        "libraries": {name: _version(name) for name in libraries},
        "gpus": gpus,
        "attention": attention_backends([f"cuda:{i}" for i in range(count)] or ["cpu"]),
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    return {
        "gpu": f"cuda:{index}",
        "name": properties.name,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "architecture": architecture or f"compute capability {properties.major}.{properties.minor}",
    }


def attention_backends(devices: Sequence[str]) -> list[dict[str, Any]]:
    """Which backend the attention measures take for queries of each type on each device, why, and whether it is right.

    Each is tried on a small input, against the definition in float64.
    """
    import torch

    from longsift.attention import chosen_backend

    rows = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            generator = torch.Generator().manual_seed(0)
            q, k = (torch.randn(1, heads, 300, 64, generator=generator).to(device, dtype) for heads in (4, 2))
            backend, why = chosen_backend(q)
            name = "blockwise PyTorch"
            if backend == "triton":
                interpreted = os.environ.get("TRITON_INTERPRET") == "1"
                name = f"Triton {_version('triton')}" + (", interpreted: slow" if interpreted else "")
                why = "a GPU, and Triton is here"
            rows.append(
                {
                    "device": device,
                    "type": str(dtype).removeprefix("torch."),
                    "backend": name,
                    "why": why,
                    "check": _tried(q, k),
                }
            )
    return rows


def _tried(q: Tensor, k: Tensor) -> str:
    """How far the measures of these queries and keys are from the definition."""
    from longsift.attention import far_statistics, span_focus

    try:
        exact = q.double().cpu(), k.double().cpu()
        far, far_exact = far_statistics(q, k, 75), far_statistics(*exact, 75, backend="reference")
        pairs = [(far.strength, far_exact.strength), (far.variance, far_exact.variance)]
        pairs.append((span_focus(q, k, 32)[..., 1:, 0], span_focus(*exact, 32, backend="reference")[..., 1:, 0]))
        largest = max(float(((ours.double().cpu() - true) / true).abs().max()) for ours, true in pairs)
    except Exception as error:  # a compiler that does not work, a GPU that is lost: doctor tells, whatever it is
        return f"FAILS: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"right to {largest:.0e}" if largest <= LARGEST_ERROR else f"WRONG by {largest:.0e}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
