"""--query-fraction: a sample of the queries estimates what all of them give, and says how far it may be off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longsift.calculators import first_layer
from longsift.calculators.first_layer import FirstLayer
from longsift.errors import UsageError
from longsift.methods import build_method, longattn, parameters_of
from longsift.methods.longattn import LongAttn, far_distance
from longsift.methods.query_sample import QuerySample, draw_queries, ordered_sum
from longsift.scoring import Scorer

CPU = torch.device("cpu")
LENGTH = 1501
MEASURES = ("dependency_strength", "variance")


@pytest.fixture(scope="module")
def calculator() -> FirstLayer:
    return FirstLayer.load("embedded")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Two windows in which, as in text, some words come often, and again and again."""
    generator = np.random.default_rng(0)
    words = generator.zipf(1.2, size=(2, LENGTH)) % 8000
    again = generator.random((2, LENGTH)) < 0.5
    again[:, :100] = False
    earlier = (np.arange(LENGTH) * generator.random((2, LENGTH))).astype(int)
    for row, (i, j) in enumerate(zip(again, earlier, strict=True)):
        for n in np.flatnonzero(i):
            words[row, n] = words[row, j[n]]
    return torch.from_numpy(words.astype(np.int64))


@pytest.mark.parametrize(
    ("length", "first", "fraction", "count"),
    [(100, 20, 1 / 8, 13), (96, 24, 1 / 4, 24), (107, 27, 1 / 3, 36), (100, 90, 1 / 2, 10), (12, 3, 1 / 5, 3)],
)
def test_one_query_is_drawn_from_each_block(length: int, first: int, fraction: float, count: int) -> None:
    sample = draw_queries(length, first, fraction, 3, CPU)
    assert sample.rows.shape == (3, count)
    sizes = sample.weights.long()
    assert sizes.sum() == length - first
    assert sizes.max() - sizes.min() <= 1
    starts = first + sizes.cumsum(0) - sizes
    assert ((starts <= sample.rows) & (sample.rows < starts + sizes)).all()


def test_every_query_of_a_block_is_as_likely_as_the_others() -> None:
    places = torch.cat([draw_queries(length, 0, 1 / 4, 1, CPU).rows[0] % 4 for length in range(4, 800, 4)])
    shares = places.bincount(minlength=4) / len(places)
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / len(places)) ** 0.5


def test_draws_do_not_depend_on_each_other() -> None:
    places = (draw_queries(8000, 0, 1 / 8, 4, CPU).rows % 8).double()
    assert (torch.corrcoef(places) - torch.eye(4)).abs().max() < 4 / 1000**0.5


def test_a_draw_is_the_same_on_every_machine_and_in_every_run() -> None:
    assert draw_queries(40, 10, 1 / 5, 2, CPU).rows.tolist() == [
        [10, 13, 20, 22, 26, 31, 32, 39],
        [10, 15, 17, 24, 25, 28, 32, 39],
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000])
def test_an_ordered_sum_is_the_sum_and_the_same_bits_among_others(count: int) -> None:
    values = torch.randn(7, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    before = values.clone()
    sums = ordered_sum(values)
    torch.testing.assert_close(sums, values.sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(sums[3], ordered_sum(values[3]))
    assert torch.equal(ordered_sum(values.T.contiguous().T), sums)
    assert torch.equal(values, before)


def other_draws(count: int) -> list[QuerySample]:
    """Draws of one query in eight, as for the two key heads, that differ only in their random numbers."""
    first = far_distance(LENGTH)
    weights = draw_queries(LENGTH, first, 1 / 8, 2, CPU).weights
    starts = first + weights.cumsum(0) - weights
    generator = torch.Generator().manual_seed(0)
    places = [torch.rand(2, len(starts), generator=generator) * weights for _ in range(count)]
    return [QuerySample(starts.long() + place.long(), weights) for place in places]


def test_over_many_draws_the_mean_is_the_exact_value_and_the_error_is_the_spread(
    calculator: FirstLayer, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = LongAttn().measure(calculator, windows)
    draws = other_draws(300)
    monkeypatch.setattr(longattn, "draw_queries", lambda *_: draws.pop())
    measured = [LongAttn(query_fraction="1/8").measure(calculator, windows) for _ in range(300)]
    assert not draws
    for name in MEASURES:
        estimates = torch.stack([each[name] for each in measured])
        reported = torch.stack([each[f"{name}_error"] for each in measured])
        bias = (estimates.mean(0) - exact[name]) / (estimates.std(0) / len(measured) ** 0.5)
        assert (bias.abs() < 4).all()
        ratio = reported.square().mean(0) / estimates.var(0)
        assert (ratio > 0.75).all()
        assert (ratio < 1.35).all()


@pytest.mark.parametrize("skip_sink", [False, True])
@pytest.mark.parametrize("every", [2, 8])
def test_an_estimate_is_within_its_error_of_the_exact_value(
    every: int, skip_sink: bool, calculator: FirstLayer, windows: torch.Tensor
) -> None:
    exact = LongAttn(skip_sink=skip_sink, detail=True).measure(calculator, windows)
    estimate = LongAttn(skip_sink=skip_sink, detail=True, query_fraction=1 / every).measure(calculator, windows)
    for name in MEASURES:
        error = estimate[f"{name}_error"]
        assert (error > 0).all()
        assert (error < 0.1 * exact[name]).all()
        assert ((estimate[name] - exact[name]).abs() < 4 * error).all()
        torch.testing.assert_close(estimate[f"{name}_heads"], exact[f"{name}_heads"], rtol=0.3, atol=0)
    assert not torch.equal(estimate["variance"], exact["variance"])


def test_all_queries_are_the_default_and_the_same_bits(calculator: FirstLayer, windows: torch.Tensor) -> None:
    whole, one = LongAttn().measure(calculator, windows), LongAttn(query_fraction=1).measure(calculator, windows)
    assert whole.keys() == one.keys() == set(MEASURES)
    assert all(torch.equal(whole[name], one[name]) for name in MEASURES)


@pytest.mark.parametrize("fraction", [1.0, 0.25], ids=["all", "quarter"])
def test_a_window_is_the_same_bits_alone_and_among_others(
    fraction: float, calculator: FirstLayer, windows: torch.Tensor
) -> None:
    method = LongAttn(detail=True, query_fraction=fraction)
    together, alone = method.measure(calculator, windows), method.measure(calculator, windows[1:])
    assert {field.name for field in method.columns()} == together.keys()
    assert all(torch.equal(together[name][1], alone[name][0]) for name in together)


def test_the_errors_stand_in_the_table_of_scores(windows: torch.Tensor) -> None:
    table = Scorer("longattn", query_fraction="1/4").score([window.tolist() for window in windows])
    assert table.column("status").to_pylist() == ["ok", "ok"]
    for name in MEASURES:
        assert 0 < table.column(f"{name}_error")[0].as_py() < 0.1 * table.column(name)[0].as_py()
    assert not any(name.endswith("_error") for name in Scorer("longattn").schema().names)


@pytest.mark.parametrize("given", ["1/8", "0.125", 0.125, " 1/8 "])
def test_a_fraction_is_a_number_or_what_reads_like_one(given: str | float) -> None:
    method = build_method("longattn", query_fraction=given)
    assert method == LongAttn(query_fraction=0.125)
    assert parameters_of(method)["query_fraction"] == 0.125
    assert build_method("longattn", **parameters_of(method)) == method


@pytest.mark.parametrize("given", ["9/8", "0", "2", "-1/8", "1/0", "half", 1e-7, float("nan"), float("inf"), ""])
def test_another_fraction_is_refused(given: str | float) -> None:
    with pytest.raises(UsageError, match=r"--query-fraction takes a share such as 1/8 or 0\.125"):
        LongAttn(query_fraction=given)


def test_a_fraction_that_leaves_no_query_out_is_exact(calculator: FirstLayer, windows: torch.Tensor) -> None:
    exact, all_far = (LongAttn(query_fraction=f).measure(calculator, windows) for f in (1, 0.9))
    for name in MEASURES:
        torch.testing.assert_close(all_far[name], exact[name], rtol=1e-6, atol=0)
        assert (all_far[f"{name}_error"] == 0).all()


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 3, 1 / 8, 1 / 1000])
@pytest.mark.parametrize("skip", [0, 128])
def test_the_shortest_window_is_the_first_with_three_queries(fraction: float, skip: int) -> None:
    shortest = LongAttn(skip_sink=skip > 0, query_fraction=fraction).shortest()

    def queries(length: int) -> int:
        return min(math.ceil(length * fraction), length - far_distance(length) - skip)

    assert queries(shortest) >= 3 > queries(shortest - 1)
    assert len(draw_queries(shortest, far_distance(shortest) + skip, fraction, 1, CPU).weights) >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fraction", [1.0, 0.125], ids=["all", "eighth"])
class TestOnGpu:
    @pytest.fixture(scope="class")
    def on_gpu(self) -> FirstLayer:
        return FirstLayer.load("embedded", device="cuda", dtype=torch.float16)

    def test_a_window_is_the_same_bits_alone_and_among_others(
        self, fraction: float, on_gpu: FirstLayer, windows: torch.Tensor
    ) -> None:
        method = LongAttn(detail=True, query_fraction=fraction)
        many = torch.cat([windows] * 9).cuda()  # so many that a library's sum would take another order
        together, alone = method.measure(on_gpu, many), method.measure(on_gpu, many[1:2])
        assert all(torch.equal(together[name][1], alone[name][0]) for name in together)
        assert all(torch.equal(together[name][17], alone[name][0]) for name in together)

    def test_all_heads_together_and_in_shares_are_the_same_bits(
        self, fraction: float, on_gpu: FirstLayer, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = LongAttn(query_fraction=fraction)
        whole = method.measure(on_gpu, windows.cuda())
        monkeypatch.setattr(first_layer, "QUERY_BYTES", 1)
        assert len(on_gpu.shares(1)) == on_gpu.kv_heads == 2
        parts = method.measure(on_gpu, windows.cuda())
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_the_second_batch_does_not_wait_for_the_gpu(
        self, fraction: float, on_gpu: FirstLayer, windows: torch.Tensor
    ) -> None:
        method, ids = LongAttn(detail=True, query_fraction=fraction), windows.cuda()
        method.measure(on_gpu, ids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            method.measure(on_gpu, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_it_is_what_a_cpu_measures(self, fraction: float, calculator: FirstLayer, windows: torch.Tensor) -> None:
        method = LongAttn(query_fraction=fraction)
        exact = FirstLayer.load("embedded", device="cuda", dtype=torch.float32)
        ours, theirs = method.measure(exact, windows.cuda()), method.measure(calculator, windows)
        for name in theirs:
            torch.testing.assert_close(ours[name].cpu(), theirs[name], rtol=1e-3, atol=0)
