"""A run of longsift to which what other engines give is compared, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import longsift
from longsift.options import ModelOptions, ScoreOptions, WindowOptions

WINDOW = 512
LADM = {"span": 16, "d_afs": 1, "d_cds": 1}


@pytest.fixture(scope="session")
def documents(corpus) -> dict[str, dict]:
    """The rows of the corpus by id."""
    lines = [line for path in sorted(corpus.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="session")
def ladm(model) -> dict:
    """The arguments of an engine that measures as the run does."""
    return {"method": "ladm", "model": str(model), "window": WINDOW, "device": "cpu", **LADM}


@pytest.fixture(scope="session")
def run(corpus, model, tmp_path_factory) -> Path:
    """The corpus in windows, scored by LADM."""
    out = tmp_path_factory.mktemp("run")
    options = ModelOptions(model=str(model))
    longsift.cut([str(corpus)], out, options, WindowOptions(window=WINDOW), quiet=True)
    longsift.score(out, options, ScoreOptions(method="ladm", device="cpu", **LADM), quiet=True)
    return out


@pytest.fixture(scope="session")
def table(run):
    """The rows of a table of the run, or of its selection, by window id."""

    def read(name: str) -> dict[str, dict]:
        found = pa.concat_tables(pq.read_table(path) for path in sorted((run / name).glob("*.parquet")))
        return {row["window_id"]: row for row in found.to_pylist()}

    return read
