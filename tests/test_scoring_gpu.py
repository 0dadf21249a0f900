"""On a GPU: batches, too little memory and several processes change no bit of a score."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longsift.batches import Row
from longsift.cli import app
from longsift.errors import ModelError
from longsift.scoring import Scorer
from longsift.tables import parquet_files
from test_scoring import random_windows, write_windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS = ["longattn", "ladm", "calibrated"]
LENGTHS = [4096, 2500, 4096, 4096, 2500, 4096, 4096, 4096]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("together", [2, 5])
def test_a_score_is_the_same_bits_however_many_windows_are_sent_together(method, together, tmp_path):
    path = write_windows(tmp_path / "windows.parquet", random_windows(LENGTHS))
    alone, batched = (
        Scorer(method, device="cuda", batch_tokens=tokens).score_shard(path) for tokens in (1, together * 4096)
    )
    assert alone["status"].unique().to_pylist() == ["ok"]
    assert alone.equals(batched)


@pytest.mark.parametrize("method", METHODS)
def test_the_host_does_not_wait_for_the_gpu_while_it_sends_a_batch(method):
    scorer = Scorer(method, device="cuda", batch_tokens=4 * 4096)
    windows = random_windows([4096] * 4)
    for _ in range(4):  # what is made once is made, and forwards are recorded
        expected = scorer.measure_batch(windows)
    [batch] = scorer._prepare([Row({}, ids, len(ids)) for ids in windows])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        [flight] = scorer._launch(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    flight.land()
    assert [row.result for row in batch.rows] == expected


class TestTooLittleMemory:
    @pytest.fixture(autouse=True)
    def all_memory_afterwards(self) -> Iterator[None]:
        torch.cuda.empty_cache()
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

    def leave_room_for(self, scorer: Scorer, windows: list[np.ndarray], times: float) -> None:
        """Let this process have `times` the memory that measuring these windows takes, and a little at least."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        scorer.measure_batch(windows)
        more = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + max(times * more, 64 << 20)) / total)

    def test_the_same_windows_are_measured_again_in_halves(self, caplog):
        scorer = Scorer("longattn", device="cuda", batch_tokens=64 * 8192)
        windows = random_windows([8192] * 64)
        expected = scorer.measure_batch(windows)
        self.leave_room_for(scorer, windows[:8], 1.5)
        with caplog.at_level(logging.WARNING):
            assert scorer.measure_batch(windows) == expected
            assert scorer.measure_batch(windows) == expected
        assert scorer._most[8192] in (4, 8, 16)
        assert sum("do not fit in the memory together" in record.getMessage() for record in caplog.records) == 1

    @pytest.mark.parametrize("method", METHODS)
    def test_a_window_that_does_not_fit_alone_fails_alone(self, method):
        scorer = Scorer(method, device="cuda", batch_tokens=1)
        short, [long] = random_windows([4096] * 4), random_windows([1 << 19])
        expected = scorer.measure_batch(short)
        self.leave_room_for(scorer, short[:1], 2.0)
        results = scorer.measure_batch([*short[:2], long, *short[2:]])
        assert isinstance(results[2], ModelError)
        assert str(results[2]) == "out of memory at 524,288 tokens"
        assert [*results[:2], *results[3:]] == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in parquet_files(folder)}


@pytest.mark.parametrize("method", ["longattn", "calibrated"])
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_on_gpus_write_the_same_bytes_as_this_one(method, workers, corpus, tmp_path):
    """Each has a GPU of its own where there are two; else they share one."""
    flags = ["--method", method, "--window", "1024", "--shard-tokens", "4096", "--device", "cuda", "-q"]

    def run(command: str, inputs: Path, out: Path, *more: str) -> None:
        result = CliRunner().invoke(app, [command, str(inputs), "-o", str(out), *flags, *more])
        assert result.exit_code == 0, result.output

    run("run", corpus, tmp_path / "processes", "--workers", str(workers))  # cut and scored at once
    run("score", tmp_path / "processes", tmp_path / "here", "--device", "cuda:0")
    assert len(contents(tmp_path / "here" / "scores")) > 2
    assert contents(tmp_path / "here" / "scores") == contents(tmp_path / "processes" / "scores")
