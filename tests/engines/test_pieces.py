"""Processes that each cut pieces of their own: what they leave when they die, and what they cannot read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from longsift.cutting import cut_sources
from longsift.engines import pieces
from longsift.errors import InputError, ProcessLost
from longsift.options import ModelOptions, WindowOptions
from longsift.shards import RunFolder
from longsift.sources import find_sources
from test_cutting import contents, write

OPTIONS = {"window": 64, "shard_tokens": 256, "piece_bytes": 3000}


def cut(inputs: list[str], out: Path, workers: int, model: str | None = None) -> RunFolder:
    folder, options = RunFolder(out), WindowOptions(cut_workers=workers, **OPTIONS)
    with folder.lock():
        cut_sources(find_sources(inputs), folder, ModelOptions(model=model), options, overwrite=False, quiet=True)
    return folder


@pytest.fixture
def mortal(monkeypatch, tmp_path):
    """Have processes die at a piece, so many times."""
    monkeypatch.setattr(pieces, "_TARGET", "engines.child_functions:cut_pieces")
    return lambda shard, times: (tmp_path / "mortal").write_text(f"{shard} {times}")


def test_a_process_that_dies_costs_its_piece_one_more_try(mortal, tmp_path, caplog):
    inputs = write(tmp_path / "in", "jsonl")
    mortal("00000-00003", 1)
    folder = cut(inputs, tmp_path / "out", 2)
    assert (tmp_path / "tries").read_text() == "x"
    assert "killed by SIGKILL) at piece 00000-00003 (" in caplog.text
    quiet = cut(inputs, tmp_path / "quiet", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")
    assert folder.section("windows")["counts"] == quiet.section("windows")["counts"]


def test_a_piece_that_ends_two_processes_ends_the_run_which_can_go_on(mortal, tmp_path):
    inputs = write(tmp_path / "in", "jsonl")
    mortal("00000-00003", 2)
    with pytest.raises(ProcessLost, match=r"\(killed by SIGKILL\) at piece 00000-00003 \(.*0\.jsonl\)"):
        cut(inputs, tmp_path / "out", 2)
    cut(inputs, tmp_path / "out", 2)
    cut(inputs, tmp_path / "quiet", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")


def test_pieces_that_cannot_be_read_do_not_stop_the_others(tmp_path):
    [inputs] = write(tmp_path / "in", "jsonl")
    sources = find_sources([inputs])
    lost = Path(sources[0].url)
    lost.unlink()
    folder, options = RunFolder(tmp_path / "out"), WindowOptions(cut_workers=2, **OPTIONS)
    with folder.lock(), pytest.raises(InputError, match=rf"1 of 2 files could not be read.*{lost}"):
        cut_sources(sources, folder, ModelOptions(), options, overwrite=False, quiet=True)
    left = folder.pieces().keys() - folder.records("windows").keys()
    assert left == {shard for shard, piece in folder.pieces().items() if piece.source.url == str(lost)}


def test_the_seconds_of_cutting_are_those_of_the_clock(tmp_path):
    inputs = write(tmp_path / "in", "jsonl")
    began = time.perf_counter()
    folder = cut(inputs, tmp_path / "out", 2)
    took = time.perf_counter() - began
    each = [record["seconds"] for record in folder.records("windows").values()]
    assert max(each) <= folder.section("windows")["seconds"] <= min(took, sum(each)) + 0.1


def test_pieces_of_ids_need_no_tokenizer(tmp_path):
    rows = [{"id": f"d{i}", "input_ids": [i % 50 + 1] * 70} for i in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = cut([str(tmp_path / "in.jsonl")], tmp_path / "out", 2, model="no/such-model")
    assert folder.section("windows")["counts"]["windows"] == 200
    assert len(folder.records("windows")) > 8
