"""Selecting from runs: what the score files hold for it, through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from test_pipeline import longsift, table


@pytest.fixture(scope="module")
def scored(corpus, model, tmp_path_factory) -> Path:
    """A scored LongAttn run, with shards of a few windows."""
    out = tmp_path_factory.mktemp("scored") / "out"
    flags = ["--model", model, "--method", "longattn", "--window", 512, "--shard-tokens", 4096]
    longsift("score", corpus, "-o", out, *flags, "-q")
    return out


def test_scores_tell_where_a_window_starts_and_whether_it_has_the_ids_of_another(scored):
    windows, scores = table(scored / "windows"), table(scored / "scores")
    assert scores["start"].to_pylist() == windows["start"].to_pylist()
    assert len(set(scores["start"].to_pylist())) > 3
    hashes = [
        hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=16).digest()
        for ids in windows["input_ids"].to_pylist()
    ]
    assert scores["ids_hash"].to_pylist() == hashes
