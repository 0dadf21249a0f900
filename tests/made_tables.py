"""Small windows and scores tables for the tests of selection, data set and report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longsift.selection import Choice, ScoreRule, Term
from longsift.tables import SCORE_KEYS, WINDOWS

LONGATTN = ScoreRule((Term("dependency_strength", 1.0), Term("variance", -0.5)), "zscore")
STRENGTH = ScoreRule((Term("dependency_strength", 1.0),), "none")


@dataclass
class Row:
    """One window: its place in the tables and its measures."""

    group: str = "book"
    strength: float | None = 0.5
    variance: float | None = 1e-9
    window_id: str = ""
    start: int = 0
    n_tokens: int = 100
    text: str | None = "once upon a time"
    metadata: dict[str, Any] | str = field(default_factory=dict)
    status: str = "ok"
    ids: list[int] | None = None  # by default different in every window


def write_tables(out: Path, shards: list[list[Row]], row_group: int = 1 << 20) -> None:
    """Write OUT/windows and OUT/scores, one file a shard."""
    for name in ("windows", "scores"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for s, rows in enumerate(shards):
        ids = [row.window_id or f"d{s}-{i}:0" for i, row in enumerate(rows)]
        documents = [window_id.rpartition(":")[0] for window_id in ids]
        keys = {
            "window_id": ids,
            "doc_id": documents,
            "group": [row.group for row in rows],
            "start": [row.start for row in rows],
            "n_tokens": [row.n_tokens for row in rows],
        }
        input_ids = [row.ids or [s, i] for i, row in enumerate(rows)]
        windows = keys | {
            "index": [0] * len(rows),
            "input_ids": input_ids,
            "text": [row.text for row in rows],
            "metadata": [row.metadata if isinstance(row.metadata, str) else json.dumps(row.metadata) for row in rows],
        }
        scores = keys | {
            "ids_hash": [hashlib.blake2b(np.array(ids, "<i4"), digest_size=16).digest() for ids in input_ids],
            "status": [row.status for row in rows],
            "reason": [None if row.status == "ok" else "out of memory" for row in rows],
            "dependency_strength": [row.strength for row in rows],
            "variance": [row.variance for row in rows],
        }
        measures = [pa.field("dependency_strength", pa.float64()), pa.field("variance", pa.float64())]
        for name, columns, schema in (
            ("windows", windows, WINDOWS),
            ("scores", scores, pa.schema([*SCORE_KEYS, *measures])),
        ):
            table = pa.table(columns, schema=schema)
            pq.write_table(table, out / name / f"shard-{s:05d}.parquet", row_group_size=row_group)


def document(name: str, *windows: tuple[int, float], group: str = "book") -> list[Row]:
    """Windows of one document, given by start and strength."""
    return [Row(group, strength, window_id=f"{name}:{i}", start=start) for i, (start, strength) in enumerate(windows)]


def kept_rows(choice: Choice) -> list[tuple[str, int, str, float, int]]:
    return [
        (shard, row["row"], row["window_id"], row["score"], row["rank"])
        for shard, table in choice.chosen()
        for row in table.to_pylist()
    ]
