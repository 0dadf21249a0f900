"""Every backend gives the numbers of the reference in float64, at any size, and the same bits every time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longsift.attention import attention_and_focus, far_statistics, span_focus

BACKENDS = ["cpu"]
RELATIVE = 1e-5

# heads, key heads, length, head_dim: odd lengths around and beyond the tiles, from multi-head to multi-query
SHAPES = [
    pytest.param(1, 1, 2, 8, id="two-tokens"),
    pytest.param(3, 3, 63, 8, id="MHA-L63-d8"),
    pytest.param(6, 2, 127, 24, id="GQA3-L127-d24"),
    pytest.param(9, 3, 257, 64, id="GQA3-L257-d64"),
    pytest.param(8, 1, 513, 32, id="MQA8-L513-d32"),
    pytest.param(4, 1, 1000, 128, id="GQA4-L1000-d128"),
    pytest.param(1, 1, 1531, 16, id="MHA-L1531-d16"),
]


def queries_and_keys(
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    *,
    batch: int = 1,
    sharpness: float = 1.5,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, head_dim, generator=generator)
    k = torch.randn(batch, kv_heads, length, head_dim, generator=generator)
    return sharpness * q, sharpness * k


def assert_close(measured: torch.Tensor, exact: torch.Tensor, relative: float = RELATIVE) -> None:
    torch.testing.assert_close(measured.double(), exact.double(), rtol=relative, atol=1e-30)


def assert_far_statistics_exact(q: torch.Tensor, k: torch.Tensor, distance: int, **options: Any) -> None:
    backend = options.pop("backend")
    measured = far_statistics(q, k, distance, backend=backend, **options)
    exact = far_statistics(q.double(), k.double(), distance, backend="reference", **options)
    assert_close(measured.strength, exact.strength)
    assert_close(measured.variance, exact.variance)
    assert_close(measured.mass, exact.mass)
    assert_close(measured.squares, exact.squares)


def assert_span_focus_exact(q: torch.Tensor, k: torch.Tensor, span: int, **options: Any) -> None:
    backend = options.pop("backend")
    measured = span_focus(q, k, span, backend=backend, **options)
    exact = span_focus(q.double(), k.double(), span, backend="reference", **options)
    assert_close(measured, exact)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_statistics_match_the_reference(
    backend: str, heads: int, kv_heads: int, length: int, head_dim: int, softcap: float | None
) -> None:
    q, k = queries_and_keys(heads, kv_heads, length, head_dim)
    quarter = length - 3 * (length // 4)
    assert_far_statistics_exact(q, k, quarter, softcap=softcap, backend=backend)


@pytest.mark.parametrize("distance", [0, 1, 2, 100, 299, 300, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_statistics_match_the_reference_at_any_distance(backend: str, distance: int) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    assert_far_statistics_exact(q, k, distance, backend=backend)


@pytest.mark.parametrize("skip", [0, 70])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([299], id="last"),
        pytest.param([0], id="first"),
        pytest.param([5, 6, 80, 140, 141, 142, 260], id="some"),
        pytest.param(list(range(3, 300, 8)), id="every-eighth"),
        pytest.param(list(range(300)), id="all"),
    ],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_chosen_rows_are_rows_of_the_whole(backend: str, rows: list[int], skip: int) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    some = torch.tensor(rows)
    every = far_statistics(q.double(), k.double(), 75, skip=skip, backend="reference")
    measured = far_statistics(q[:, :, some], k, 75, rows=some, skip=skip, backend=backend)
    assert_close(measured.mass, every.mass[:, :, some])
    assert_close(measured.squares, every.squares[:, :, some])
    assert_close(measured.strength, every.mass[:, :, some].mean(-1))
    if rows == list(range(300)):
        assert_close(measured.variance, every.variance)


@pytest.mark.parametrize("distance", [1, 100, 400])
@pytest.mark.parametrize("skip", [1, 64, 128, 259, 900, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_statistics_match_the_reference_without_the_first_keys(backend: str, skip: int, distance: int) -> None:
    q, k = queries_and_keys(8, 2, 900, 16)
    assert_far_statistics_exact(q, k, distance, skip=skip, backend=backend)


@pytest.mark.parametrize("window", [1, 64, 100, 225, 226, 511, 899, 900, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_statistics_of_a_sliding_layer_match_the_reference(backend: str, window: int) -> None:
    q, k = queries_and_keys(8, 2, 900, 16)
    options: dict[str, Any] = {"sliding_window": window, "backend": backend}
    for distance, skip, softcap in ((225, 0, None), (225, 128, 3.0), (0, 0, None), (70, 300, None)):
        assert_far_statistics_exact(q, k, distance, skip=skip, softcap=softcap, **options)
    measured = far_statistics(q, k, 225, **options)
    if window >= 900:
        assert torch.equal(measured.squares, far_statistics(q, k, 225, backend=backend).squares)
    if window <= 225:
        assert not measured.mass.any()
        assert not measured.variance.any()


@pytest.mark.parametrize("window", [3, 90, 200])
@pytest.mark.parametrize("rows", [[299], [0], [5, 6, 80, 140, 141, 142, 260], list(range(3, 300, 8))], ids=len)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_chosen_rows_of_a_sliding_layer_are_rows_of_the_whole(backend: str, rows: list[int], window: int) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    some = torch.tensor(rows)
    every = far_statistics(q.double(), k.double(), 75, skip=20, sliding_window=window, backend="reference")
    measured = far_statistics(q[:, :, some], k, 75, rows=some, skip=20, sliding_window=window, backend=backend)
    assert_close(measured.mass, every.mass[:, :, some])
    assert_close(measured.squares, every.squares[:, :, some])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_sliding_layer_no_longer_sees_can_be_anything(backend: str) -> None:
    q, k = queries_and_keys(2, 1, 600, 8)
    seen = far_statistics(q, k, 50, sliding_window=200, backend=backend)
    k[:, :, :150] = torch.nan
    hidden = far_statistics(q, k, 50, sliding_window=200, backend=backend)
    assert hidden.mass[:, :, : 149 + 200].isnan().all()
    assert_close(hidden.mass[:, :, 149 + 200 :], seen.mass[:, :, 149 + 200 :])


@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("span", [1, 16, 37, 600])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim"), SHAPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_span_focus_matches_the_reference(
    backend: str, heads: int, kv_heads: int, length: int, head_dim: int, span: int, denominator: str
) -> None:
    q, k = queries_and_keys(heads, kv_heads, length, head_dim)
    n_spans = length // min(span, length)
    some = sorted({0, 1 % n_spans, n_spans // 2, n_spans - 1})
    assert_span_focus_exact(q, k, min(span, length), denominator=denominator, query_spans=some, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_span_focus_matches_the_reference_under_a_soft_cap(backend: str) -> None:
    q, k = queries_and_keys(4, 2, 500, 16)
    for denominator in ("prior", "causal"):
        assert_span_focus_exact(q, k, 64, softcap=2.0, denominator=denominator, backend=backend)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 90),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    distance=st.integers(0, 100),
    skip=st.integers(0, 100),
    window=st.none() | st.integers(1, 100),
    span=st.integers(1, 90),
    denominator=st.sampled_from(["prior", "causal"]),
    seed=st.integers(0, 1000),
)
def test_any_small_window_matches_the_reference(
    length: int,
    group: int,
    kv_heads: int,
    distance: int,
    skip: int,
    window: int | None,
    span: int,
    denominator: str,
    seed: int,
) -> None:
    q, k = queries_and_keys(group * kv_heads, kv_heads, length, 5, batch=2, seed=seed)
    assert_far_statistics_exact(q, k, distance, skip=skip, scale=0.4, sliding_window=window, backend="cpu")
    assert_span_focus_exact(q, k, min(span, length), denominator=denominator, scale=0.4, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_other_dtypes_are_measured_to_float32_accuracy(backend: str, dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in queries_and_keys(4, 2, 700, 64))
    assert_far_statistics_exact(q, k, 175, backend=backend)
    assert_span_focus_exact(q, k, 128, backend=backend)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_the_hundreds_neither_overflow_nor_vanish(backend: str, direction: int) -> None:
    length = 1100
    ramp = torch.linspace(-120, 120, length) * direction  # each row's maximum is its newest or its oldest key
    q = torch.ones(1, 1, length, 1)
    k = ramp.view(1, 1, length, 1)
    measured = far_statistics(q, k, 5, scale=1.0, backend=backend)
    exact = far_statistics(q.double(), k.double(), 5, scale=1.0, backend="reference")
    assert_close(measured.strength, exact.strength, 1e-4)  # float32 holds a logit of 120 to about 1e-5
    assert_close(measured.variance, exact.variance, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_attention_is_exact(backend: str) -> None:
    q, k = queries_and_keys(4, 2, 700, 64, sharpness=6.0)  # logits spread over ±150: most probabilities are 0
    for distance in (1, 175):
        measured = far_statistics(q, k, distance, backend=backend)
        exact = far_statistics(q.double(), k.double(), distance, backend="reference")
        assert_close(measured.strength, exact.strength, 1e-4)
        assert_close(measured.variance, exact.variance, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_attention_has_strength_0_403(backend: str) -> None:
    length = 4096
    q = torch.zeros(1, 1, length, 8)
    strength = far_statistics(q, q, length // 4, backend=backend).strength
    assert float(strength) == pytest.approx(0.403, abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chosen_query_spans_are_rows_of_the_dense_result(backend: str) -> None:
    q, k = queries_and_keys(4, 2, 530, 16)
    dense = span_focus(q, k, 32, backend=backend)
    chosen = range(15, 2, -4)
    torch.testing.assert_close(
        span_focus(q, k, 32, query_spans=chosen, backend=backend), dense[:, :, list(chosen)], rtol=0, atol=0
    )
    torch.testing.assert_close(
        span_focus(q, k, 32, query_spans=[3, 3], average_heads=True, backend=backend),
        dense[:, :, [3, 3]].mean(1),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_has_the_same_bits_alone_and_in_any_batch(backend: str) -> None:
    q, k = queries_and_keys(4, 2, 600, 32, batch=3)
    together = far_statistics(q, k, 150, backend=backend)
    focus = span_focus(q, k, 64, backend=backend)
    for b in range(3):
        one = slice(b, b + 1)
        alone = far_statistics(q[one], k[one], 150, backend=backend)
        assert torch.equal(alone.strength, together.strength[one])
        assert torch.equal(alone.variance, together.variance[one])
        assert torch.equal(span_focus(q[one], k[one], 64, backend=backend), focus[one])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bits_depend_neither_on_the_run_nor_on_the_layout_of_the_inputs(backend: str) -> None:
    q, k = queries_and_keys(4, 2, 1100, 32)
    first = far_statistics(q, k, 275, backend=backend)
    for _ in range(3):
        assert torch.equal(far_statistics(q, k, 275, backend=backend).variance, first.variance)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]  # as projections leave them
    assert not strided[0].is_contiguous()
    assert torch.equal(far_statistics(strided[0], strided[1], 275, backend=backend).variance, first.variance)


def test_the_number_of_threads_changes_neither_the_bits_nor_itself() -> None:
    q, k = queries_and_keys(4, 2, 1100, 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((far_statistics(q, k, 275, backend="cpu").variance, span_focus(q, k, 100)))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for variance, focus in results[1:]:
        assert torch.equal(variance, results[0][0])
        assert torch.equal(focus, results[0][1])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_result_carries_a_gradient_graph(backend: str) -> None:
    q, k = (x.requires_grad_() for x in queries_and_keys(2, 1, 40, 8))
    assert not far_statistics(q, k, 10, backend=backend).strength.requires_grad
    assert not span_focus(q, k, 8, backend=backend).requires_grad


def test_inference_mode_gives_the_same_bits() -> None:
    q, k = queries_and_keys(2, 1, 700, 8)
    with torch.inference_mode():
        inside = far_statistics(q.clone(), k.clone(), 100), span_focus(q.clone(), k.clone(), 64)
    assert torch.equal(inside[0].strength, far_statistics(q, k, 100).strength)
    assert torch.equal(inside[1], span_focus(q, k, 64))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_is_reported_and_stays_in_its_window(backend: str) -> None:
    q, k = queries_and_keys(2, 1, 600, 8, batch=2)
    k[0, 0, 3] = torch.nan
    statistics = far_statistics(q, k, 100, backend=backend)
    assert statistics.strength[0].isnan().all()
    assert statistics.variance[0].isnan().all()
    assert statistics.strength[1].isfinite().all()
    assert span_focus(q, k, 64, query_spans=[5], backend=backend)[0, :, :, :5].isnan().all()


def test_an_error_in_a_block_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from longsift.attention import cpu

    def fail(*_: object) -> torch.Tensor:
        raise MemoryError("no room for a tile")

    monkeypatch.setattr(cpu, "_far_block", fail)
    q, k = queries_and_keys(2, 1, 600, 8)
    threads = torch.get_num_threads()
    with pytest.raises(MemoryError, match="no room"):
        far_statistics(q, k, 100, backend="cpu")
    assert torch.get_num_threads() == threads


MEMORY_PROGRAM = """
import sys, torch
from longsift.attention import attention_and_focus, causal_attention, far_statistics, span_focus

measures = {
    "far_statistics": lambda q, k: far_statistics(q, k, q.shape[2] // 4),
    "span_focus": lambda q, k: span_focus(q, k, 128),
    "soft-capped output": lambda q, k: causal_attention(q, k, k, scale=0.1, softcap=5.0),
    "sliding output": lambda q, k: causal_attention(q, k, k, scale=0.1, sliding_window=512),
}

def status(key):  # not resource.ru_maxrss: a process inherits that from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

measure = measures[sys.argv[1]]
q, k = torch.randn(1, 2, 8192, 32), torch.randn(1, 1, 8192, 32)
measure(q[:, :, :1024], k[:, :, :1024])  # threads, library buffers
before = status("VmRSS")
measure(q, k)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["far_statistics", "span_focus", "soft-capped output", "sliding output"])
def test_memory_stays_far_under_one_map(name: str) -> None:
    command = [sys.executable, "-c", MEMORY_PROGRAM, name]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024
    one_map = 2 * 8192 * 8192 * 4
    assert growth < one_map / 5, f"{growth / 2**20:.0f} MiB"


def test_the_mean_over_heads_is_the_same_from_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = queries_and_keys(6, 3, 300, 16, batch=2)
    v = k.clone()
    at_once = span_focus(q, k, 32, average_heads=True)
    out, focus = attention_and_focus(q, k, v, 32, scale=0.25, average_heads=True)
    monkeypatch.setattr("longsift.attention.FOCUS_BYTES", 1)
    torch.testing.assert_close(span_focus(q, k, 32, average_heads=True), at_once)
    again, few = attention_and_focus(q, k, v, 32, scale=0.25, average_heads=True)
    torch.testing.assert_close(few, focus)
    assert torch.equal(again, out)
