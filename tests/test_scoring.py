"""The Scorer: how windows are grouped, sent, refused and retried changes no score and loses none."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longsift import Scorer
from longsift.batches import Prefetched, Row, Shard, group_rows
from longsift.errors import ModelError
from longsift.rules import ScoreRule, Term
from longsift.tables import WINDOWS

LENGTHS = [300, 129, 300, 300, 64, 129, 300, 2, 300, 129, 300]  # in a file's order; 2 is too short for LongAttn
NAN, REFUSED = 7, 9  # ids that make `Sums` give no number, or refuse the window


@dataclass(frozen=True)
class Sums:
    """The sum of a window's ids, by a device that holds `room` tokens and takes note of what it was sent."""

    room: float = float("inf")
    sent: list[tuple[int, ...]] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "sums"
    calculator: ClassVar[Any] = "first_layer"
    citation: ClassVar[str] = ""

    def columns(self) -> tuple[pa.Field, ...]:
        return (pa.field("total", pa.float64()), pa.field("parity", pa.list_(pa.float64())))

    def shortest(self) -> int:
        return 3

    def measure(self, calculator: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor | list[Any]]:
        self.sent.append(tuple(input_ids.shape))
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if (input_ids == REFUSED).any():
            raise ModelError("this cannot be measured")
        total = input_ids.double().sum(1)
        total[(input_ids == NAN).any(1)] = torch.nan
        return {"total": total, "parity": [0.0, 1.0]}

    def rule(self) -> ScoreRule:
        return ScoreRule((Term("total", 1.0),), "none")


def random_windows(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(10, 500, length).astype(np.int32) for length in lengths]


def write_windows(path: Path, windows: list[np.ndarray]) -> Path:
    rows = [
        {"window_id": f"d{i}:0", "doc_id": f"d{i}", "group": "all", "index": 0, "start": 0, "metadata": "{}"}
        | {"n_tokens": len(ids), "input_ids": ids.tolist()}
        for i, ids in enumerate(windows)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=WINDOWS), path)
    return path


def test_what_overlaps_and_what_is_twice_is_selected_in_memory_as_by_the_command(model: Path) -> None:
    scorer = Scorer("longattn", model=str(model), device="cpu")
    text = "\n".join(f"def far_{i}(n):  # {i * 7919}\n    return n" for i in range(60))
    texts = [text, text[:1500] * 2, text[:1500] * 2]
    scores = scorer.score(texts, window=300)
    starts = dict(zip(scores["window_id"].to_pylist(), scores["start"].to_pylist(), strict=True))
    lasts = {window_id.split(":")[0]: start for window_id, start in starts.items()}
    assert any(start % 299 for start in lasts.values())  # a last window that overlaps the one before
    assert scores["ids_hash"].null_count == 0

    def overlapping(kept: pa.Table) -> int:
        by_text: dict[str, list[int]] = {}
        for doc_id, start in zip(kept["doc_id"].to_pylist(), kept["start"].to_pylist(), strict=True):
            by_text.setdefault(doc_id, []).append(start)
        return sum(b - a < 299 for some in map(sorted, by_text.values()) for a, b in pairwise(some))

    every = scorer.select(scores, keep=1.0)
    assert overlapping(every) > 0
    share = (len(scores) - overlapping(every)) / len(scores) * 0.99
    assert overlapping(scorer.select(scores, keep=share)) == 0
    assert overlapping(scorer.select(scores, keep=share, overlap=True)) > 0
    once = scorer.select(scores, keep=1.0, dedup="exact")
    assert len(set(once["ids_hash"].to_pylist())) == len(once) < len(every)


@pytest.mark.parametrize("method", ["longattn", "ladm"])
@pytest.mark.parametrize("together", [2, 5])
def test_a_score_is_the_same_bits_however_many_windows_are_sent_together(method, together, model, tmp_path):
    parameters = {"detail": True} if method == "longattn" else {"span": 8, "d_afs": 1, "d_cds": 1}
    path = write_windows(tmp_path / "windows.parquet", random_windows(LENGTHS))
    alone, batched = (
        Scorer(method, model=str(model), device="cpu", batch_tokens=tokens, **parameters).score_shard(path)
        for tokens in (1, together * 300)
    )
    assert alone.equals(batched)
    assert alone["n_tokens"].to_pylist() == LENGTHS
    failed = {i for i, status in enumerate(alone["status"].to_pylist()) if status == "failed"}
    assert failed == {i for i, length in enumerate(LENGTHS) if length < (4 if method == "longattn" else 49)}


def test_windows_of_one_length_go_together_up_to_the_tokens_of_a_batch(model):
    method = Sums()
    windows = random_windows(LENGTHS)
    measured = Scorer(method, model=str(model), device="cpu", batch_tokens=900).measure_batch(windows)
    assert sorted(method.sent) == [(1, 64), (3, 129), (3, 300), (3, 300)]
    totals = [result["total"] for result in measured if isinstance(result, dict)]
    assert totals == [ids.sum() for ids in windows if len(ids) > 2]
    assert {tuple(result["parity"]) for result in measured if isinstance(result, dict)} == {(0.0, 1.0)}


def test_windows_that_wait_for_others_of_their_length_hold_few_tokens():
    lengths = [*range(100, 160), 100]
    held, most = 0, 0
    rows = [Row({}, ids, len(ids)) for ids in random_windows(lengths)]

    def counted():
        nonlocal held, most
        for row in rows:
            held += row.n_tokens
            most = max(most, held)
            yield row

    batches = []
    for batch in group_rows(counted(), 500, pinned=False):
        held -= batch.ids.numel()
        batches.append(batch)
    assert most <= 4 * 500 + 160
    assert sum(len(batch.rows) for batch in batches) == len(lengths)
    assert all(row.input_ids is None for row in rows)


@pytest.mark.parametrize(
    ("place", "token", "reason"),
    [
        (0, 512, "Token id 512 is outside the model's vocabulary of 512"),
        (2, -1, "Token id -1 is outside"),
        (2, NAN, "the measures are not finite"),
        (4, REFUSED, "this cannot be measured"),
    ],
    ids=["foreign", "negative", "not finite", "refused by the method"],
)
def test_a_window_that_fails_fails_alone(place, token, reason, model, tmp_path):
    windows = random_windows([50] * 5)
    windows[place][20] = token
    scorer = Scorer(Sums(), model=str(model), device="cpu", batch_tokens=250)
    calls = []
    table = scorer.score_shard(write_windows(tmp_path / "w.parquet", windows), lambda *call: calls.append(call))
    for i, row in enumerate(table.to_pylist()):
        if i == place:
            assert (row["status"], row["total"], row["parity"]) == ("failed", None, None)
            assert reason in row["reason"]
        else:
            assert (row["status"], row["reason"], row["total"]) == ("ok", None, windows[i].sum())
    assert sorted(calls) == sorted((50, i != place) for i in range(5))
    with pytest.raises(ModelError, match=reason.partition(" (")[0]):
        scorer.measure(windows[place])


class TestOutOfMemory:
    def test_the_same_windows_are_sent_again_in_halves_and_later_ones_in_what_fits(self, model, tmp_path, caplog):
        method, windows = Sums(room=250), random_windows([100] * 16)
        scorer = Scorer(method, model=str(model), device="cpu", batch_tokens=800)
        with caplog.at_level(logging.WARNING):
            table = scorer.score_shard(write_windows(tmp_path / "w.parquet", windows))
        assert table["total"].to_pylist() == [ids.sum() for ids in windows]
        assert [n for n, _ in method.sent] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
        assert [record.getMessage() for record in caplog.records] == [
            "8 windows of 100 tokens do not fit in the memory together: fewer from now on (--batch-tokens)"
        ]

    def test_a_window_that_does_not_fit_alone_is_a_failed_row_and_shorter_ones_are_scored(self, model):
        method, windows = Sums(room=250), random_windows([300, 100, 300, 100])
        result = Scorer(method, model=str(model), device="cpu", batch_tokens=600).measure_batch(windows)
        assert [str(result[i]) for i in (0, 2)] == ["out of memory at 300 tokens"] * 2
        assert [result[i]["total"] for i in (1, 3)] == [windows[i].sum() for i in (1, 3)]
        assert method.sent.count((1, 300)) == 4  # each once more, after the memory was released

    def test_other_errors_of_that_kind_without_a_type_of_their_own_count_too(self, model):
        class Library(Sums):
            def measure(self, calculator, input_ids):
                if len(input_ids) > 1:
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
                return super().measure(calculator, input_ids)

        windows = random_windows([100, 100])
        result = Scorer(Library(), model=str(model), device="cpu", batch_tokens=200).measure_batch(windows)
        assert [measured["total"] for measured in result] == [ids.sum() for ids in windows]


def test_an_error_that_is_no_windows_fault_names_the_windows(model, tmp_path):
    class Broken(Sums):
        def measure(self, calculator, input_ids):
            raise RuntimeError("an illegal memory access was encountered")

    path = write_windows(tmp_path / "w.parquet", random_windows([50] * 3))
    with pytest.raises(RuntimeError, match="illegal memory") as error:
        Scorer(Broken(), model=str(model), device="cpu", batch_tokens=200).score_shard(path)
    assert error.value.__notes__ == ["while measuring window 'd0:0' and 2 more of its length"]


def test_shards_come_back_in_order_each_with_its_own_rows(model, tmp_path):
    shards = [random_windows(lengths, seed) for seed, lengths in enumerate([[50] * 7, [], [2], [20, 50, 20], [50]])]
    paths = [write_windows(tmp_path / f"{i}.parquet", windows) for i, windows in enumerate(shards)]
    scored = list(Scorer(Sums(), model=str(model), device="cpu", batch_tokens=100).score_shards(paths))
    assert [path for path, _ in scored] == paths
    for windows, (_, table) in zip(shards, scored, strict=True):
        assert table["total"].to_pylist() == [ids.sum() if len(ids) > 2 else None for ids in windows]


def test_a_finished_shard_is_given_out_while_the_next_is_still_to_come(model, tmp_path):
    path = write_windows(tmp_path / "w.parquet", random_windows([50] * 3))
    more = threading.Event()

    def paths():
        yield path
        assert more.wait(20)
        yield path

    scored = Scorer(Sums(), model=str(model), device="cpu").score_shards(paths())
    assert next(scored)[0] == path
    more.set()
    assert [table.num_rows for _, table in scored] == [3]


def test_the_next_batch_is_under_way_before_the_last_one_is_waited_for_also_across_shards(model, tmp_path):
    class Device(Scorer):
        """Measures at once, and takes note of what is sent and waited for, as with a GPU."""

        def _launch(self, batch):
            flights = super()._launch(batch)
            names = [row.keys["window_id"] for row in batch.rows]
            events.append(("sent", *names))
            done = SimpleNamespace(synchronize=lambda: events.append(("waited", *names)))
            return [replace(flight, done=done) for flight in flights]

    events: list[tuple[str, ...]] = []
    paths = [write_windows(tmp_path / f"{i}.parquet", random_windows([50] * 2)) for i in range(3)]
    scorer = Device(Sums(), model=str(model), device="cpu")
    with Prefetched(scorer._prepare_files(paths), 100, nullcontext) as prefetched:
        time.sleep(0.5)  # all is laid out
        shards = [item for item in scorer._run(prefetched, prefetched.ready) if isinstance(item, Shard)]
    assert [shard.path for shard in shards] == paths
    order = [("sent", "d0:0")]
    for window in ("d1:0", "d0:0", "d1:0", "d0:0", "d1:0"):
        order += [("sent", window), ("waited", "d0:0" if window == "d1:0" else "d1:0")]
    assert events == [*order, ("waited", "d1:0")]


class TestPrefetched:
    def test_a_few_items_are_made_ahead_and_no_more(self):
        made = []

        def items():
            for i in range(100):
                made.append(i)
                yield i

        with Prefetched(items(), 3, nullcontext) as prefetched:
            assert next(prefetched) == 0
            time.sleep(0.3)
            assert len(made) <= 1 + 3 + 1  # taken, waiting, and the one that waits for room
            assert list(prefetched) == list(range(1, 100))

    def test_an_error_comes_where_the_item_would_have(self):
        def items():
            yield 1
            raise OSError("the disk is gone")

        with Prefetched(items(), 3, nullcontext) as prefetched:
            assert next(prefetched) == 1
            with pytest.raises(OSError, match="the disk is gone"):
                next(prefetched)

    def test_its_thread_ends_when_nobody_wants_the_rest(self):
        before = threading.active_count()
        with Prefetched(iter(range(10_000)), 2, nullcontext) as prefetched:
            next(prefetched)
        assert threading.active_count() == before
