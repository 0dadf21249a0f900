"""The kernels give the numbers of the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

pytest.importorskip("triton")
pytestmark = [
    # What NumPy says of infinities and NaN in the interpreter is what the kernels mean to do with them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    *([pytest.mark.gpu] if ON_GPU else []),
]

from longsift.attention import attention_and_focus, far_statistics, reference, span_focus  # noqa: E402
from longsift.attention import triton as kernels  # noqa: E402

# A fast exponential is right to a few units in the last place, and its exponent, of some tens, to as many.
RELATIVE = 2e-5

SHAPES = [
    pytest.param(3, 3, 63, 16, 16, id="MHA-L63-d16-span16"),
    pytest.param(6, 2, 257, 24, 37, id="GQA3-L257-d24-span37"),
    pytest.param(9, 3, 300, 60, 128, id="GQA3-L300-d60-span128"),
    pytest.param(2, 1, 777, 64, 128, id="GQA2-L777-d64-span128"),
    pytest.param(4, 1, 530, 128, 256, id="MQA4-L530-d128-span256"),
    pytest.param(1, 1, 700, 200, 300, id="MHA-L700-d200-span300"),
    pytest.param(2, 2, 260, 256, 64, id="MHA-L260-d256-span64"),
    pytest.param(2, 1, 40, 8, 1, id="GQA2-L40-d8-span1"),
]
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(
        torch.bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies the bits of bfloat16"),
    ),
]


@pytest.fixture(autouse=True)
def _new_memory_holds_nan() -> Iterator[None]:
    """So that an entry that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling is what is wanted of it
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def queries_and_keys(
    heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = (1.5 * torch.randn(batch, n, length, head_dim, generator=generator) for n in (heads, kv_heads))
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def skip_twin(dtype: torch.dtype, in_float32: bool) -> None:
    """In the interpreter, which is slow, every case runs in one type; on a GPU in all."""
    if not ON_GPU and (dtype == torch.float32) != in_float32:
        pytest.skip("in the interpreter in the other type")


def assert_exact(q: torch.Tensor, k: torch.Tensor, span: int, **options: Any) -> None:
    measured = span_focus(q, k, span, backend="triton", **options)
    exact = span_focus(q.double().cpu(), k.double().cpu(), span, backend="reference", **options)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured.double().cpu(), exact, rtol=RELATIVE, atol=1e-30, equal_nan=True)


def assert_far_exact(
    q: torch.Tensor, k: torch.Tensor, distance: int, relative: float = RELATIVE, **options: Any
) -> None:
    measured = far_statistics(q, k, distance, backend="triton", **options)
    some = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact = far_statistics(q.double().cpu(), k.double().cpu(), distance, backend="reference", **some)
    for name in ("mass", "squares", "strength", "variance"):
        value = getattr(measured, name).double().cpu()
        # Of probabilities below 1e-16 the squares are below the smallest float32.
        torch.testing.assert_close(value, getattr(exact, name), rtol=relative, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim", "_span"), SHAPES)
def test_far_statistics_match_the_reference(
    heads: int, kv_heads: int, length: int, head_dim: int, _span: int, dtype: torch.dtype
) -> None:
    skip_twin(dtype, length % 2 == 0)
    q, k = queries_and_keys(heads, kv_heads, length, head_dim, dtype)
    assert_far_exact(q, k, length - 3 * (length // 4))


@pytest.mark.parametrize("skip", [0, 1, 70, 900])
@pytest.mark.parametrize("distance", [0, 1, 90, 128, 399, 5000])
def test_far_statistics_match_the_reference_at_any_distance_and_without_the_first_keys(
    distance: int, skip: int
) -> None:
    q, k = queries_and_keys(2, 1, 400, 16, torch.float16)
    assert_far_exact(q, k, distance, skip=skip)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_far_statistics_match_the_reference_under_a_soft_cap(softcap: float) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    assert_far_exact(q, k, 75, softcap=softcap, scale=0.4)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([299], id="last"),
        pytest.param([0], id="first"),
        pytest.param([5, 6, 80, 140, 141, 142, 260], id="some"),
        pytest.param(list(range(3, 300, 2)), id="every-second"),
    ],
)
def test_chosen_rows_match_the_reference(rows: list[int]) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    some = torch.tensor(rows, device=DEVICE)
    assert_far_exact(q[:, :, some], k, 75, rows=some, skip=20)


@pytest.mark.parametrize(
    ("window", "distance", "skip"),
    [
        pytest.param(1, 0, 0, id="itself"),
        pytest.param(20, 3, 0, id="within-a-tile"),
        pytest.param(128, 40, 260, id="whole-tiles"),
        pytest.param(131, 130, 70, id="one-far-key"),
        pytest.param(250, 99, 0, id="most"),
        pytest.param(399, 64, 1, id="all-but-one-key"),
        pytest.param(90, 90, 0, id="nothing-far"),
    ],
)
def test_far_statistics_of_a_sliding_layer_match_the_reference(window: int, distance: int, skip: int) -> None:
    q, k = queries_and_keys(2, 1, 400, 16, torch.float16)
    assert_far_exact(q, k, distance, skip=skip, sliding_window=window)
    measured = far_statistics(q, k, distance, skip=skip, sliding_window=window, backend="triton")
    assert bool(measured.mass.any()) == (window > distance)


def test_a_window_that_slides_beyond_all_keys_has_the_bits_of_none() -> None:
    q, k = queries_and_keys(2, 1, 200, 16, torch.float16)
    whole, slid = (far_statistics(q, k, 50, sliding_window=window, backend="triton") for window in (None, 200))
    assert torch.equal(slid.squares, whole.squares)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim", "_span"), SHAPES)
def test_far_statistics_of_a_sliding_layer_match_the_reference_in_any_shape(
    heads: int, kv_heads: int, length: int, head_dim: int, _span: int, dtype: torch.dtype
) -> None:
    skip_twin(dtype, length % 2 == 1)
    if not ON_GPU and heads > 4:
        pytest.skip("in the interpreter with fewer heads")
    q, k = queries_and_keys(heads, kv_heads, length, head_dim, dtype)
    assert_far_exact(q, k, length - 3 * (length // 4), sliding_window=length // 2 + 3, softcap=20.0)


@pytest.mark.parametrize("window", [3, 90, 200])
@pytest.mark.parametrize("rows", [[299], [5, 6, 80, 140, 141, 142, 260], list(range(3, 300, 2))], ids=len)
def test_chosen_rows_of_a_sliding_layer_match_the_reference(rows: list[int], window: int) -> None:
    q, k = queries_and_keys(4, 2, 300, 16)
    some = torch.tensor(rows, device=DEVICE)
    assert_far_exact(q[:, :, some], k, 75, rows=some, skip=20, sliding_window=window)


@pytest.mark.parametrize("window", [5, 150])
def test_what_a_sliding_layer_no_longer_sees_can_be_anything(window: int) -> None:
    length = 300
    q = torch.ones(1, 1, length, 1, device=DEVICE)
    k = torch.linspace(-3, 3, length, device=DEVICE).view(1, 1, length, 1)
    k[0, 0, 100] = 500.0  # overflows every sum of a row that sees it
    assert_far_exact(q, k, 60, relative=1e-4, scale=1.0, sliding_window=window)
    seen = far_statistics(q, k, 60, scale=1.0, sliding_window=window, backend="triton")
    k[0, 0, 100] = torch.nan
    hidden = far_statistics(q, k, 60, scale=1.0, sliding_window=window, backend="triton")
    assert hidden.mass[0, 0, 100 : 100 + window].isnan().all()
    hidden.mass[0, 0, 100 : 100 + window] = seen.mass[0, 0, 100 : 100 + window]
    torch.testing.assert_close(hidden.mass, seen.mass)


def test_a_sliding_window_has_the_same_bits_alone_in_any_batch_and_on_any_run() -> None:
    q, k = queries_and_keys(2, 1, 330, 32, torch.float16, batch=2)
    together = far_statistics(q, k, 80, sliding_window=141, backend="triton")
    again = far_statistics(q, k, 80, sliding_window=141, backend="triton")
    assert torch.equal(again.squares, together.squares)
    for b in range(2):
        alone = far_statistics(q[b : b + 1], k[b : b + 1], 80, sliding_window=141, backend="triton")
        assert torch.equal(alone.squares, together.squares[b : b + 1])


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sliding_layers_match_the_blocks_of_pytorch(dtype: torch.dtype, head_dim: int) -> None:
    q, k = queries_and_keys(8, 2, 8191, head_dim, dtype)
    for window in (2049, 4096, 8190):
        ours = far_statistics(q, k, 2048, sliding_window=window, backend="triton")
        exact = far_statistics(q.double(), k.double(), 2048, sliding_window=window, backend="cpu")
        torch.testing.assert_close(ours.strength, exact.strength, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(ours.variance, exact.variance, rtol=1e-4, atol=1e-30)


def test_far_statistics_have_the_same_bits_alone_in_any_batch_on_any_run_and_in_any_layout() -> None:
    q, k = queries_and_keys(2, 1, 210, 32, batch=2)
    together = far_statistics(q, k, 50, backend="triton")
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k)]
    again = [far_statistics(q, k, 50, backend="triton"), far_statistics(*strided, 50, backend="triton")]
    for name in ("mass", "squares", "strength", "variance"):
        bits = getattr(together, name)
        assert all(torch.equal(getattr(other, name), bits) for other in again)
        for b in range(2):
            alone = far_statistics(q[b : b + 1], k[b : b + 1], 50, backend="triton")
            assert torch.equal(getattr(alone, name), bits[b : b + 1])


def test_far_statistics_report_nan_in_its_window_alone() -> None:
    q, k = queries_and_keys(2, 1, 300, 16, batch=2)
    k[0, 0, 230] = torch.nan
    measured = far_statistics(q, k, 75, backend="triton")
    assert measured.mass[0, :, 230:].isnan().all()
    assert measured.strength[0].isnan().all()
    assert measured.mass[0, :, :100].isfinite().all()
    assert measured.strength[1].isfinite().all()


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_far_statistics_of_logits_in_the_hundreds_neither_overflow_nor_vanish(direction: int) -> None:
    length = 400
    q = torch.ones(1, 1, length, 1, device=DEVICE)
    k = torch.linspace(-120, 120, length, device=DEVICE).view(1, 1, length, 1) * direction
    assert_far_exact(q, k, 100, relative=1e-4, scale=1.0)
    k[0, 0, 200] = 300.0  # far above all that is near a later row or first
    measured = far_statistics(q, k, 100, scale=1.0, backend="triton")
    assert (measured.mass[0, 0, 300:] == 1).all()


@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim", "value_dim", "scale"),
    [
        pytest.param(2, 1, 256, 16, 16, 0.25, id="whole-spans"),
        pytest.param(3, 1, 300, 24, 24, 0.25, id="keys-before-the-first-span"),
        pytest.param(1, 1, 270, 64, 32, 4.0, id="sharp"),
        pytest.param(1, 1, 270, 128, 128, 0.1, id="wide"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_and_focus_are_both_right(
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    softcap: float | None,
    denominator: Any,
    dtype: torch.dtype,
) -> None:
    q, k = queries_and_keys(heads, kv_heads, length, head_dim, dtype, batch=2)
    v = torch.randn(2, kv_heads, length, value_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    out, focus = attention_and_focus(q, k, v, 128, denominator=denominator, backend="triton", **options)
    exact = span_focus(q.double().cpu(), k.double().cpu(), 128, denominator=denominator, backend="reference", **options)
    torch.testing.assert_close(focus.double().cpu(), exact, rtol=1e-4, atol=1e-30)
    attended = reference.causal_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), **options)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double().cpu(), attended, rtol=0, atol=4 * torch.finfo(dtype).eps * float(v.abs().max())
    )
    alone = attention_and_focus(
        q[1:], k[1:], v[1:], 128, denominator=denominator, query_spans=[1, 0], backend="triton", **options
    )
    assert torch.equal(alone[0], out[1:])
    assert torch.equal(alone[1], focus[1:, :, [1, 0]])


@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim", "span"), SHAPES)
def test_span_focus_matches_the_reference(
    heads: int, kv_heads: int, length: int, head_dim: int, span: int, dtype: torch.dtype, denominator: str
) -> None:
    skip_twin(dtype, denominator == "prior")
    q, k = queries_and_keys(heads, kv_heads, length, head_dim, dtype)
    assert_exact(q, k, span, denominator=denominator)


@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_span_focus_matches_the_reference_under_a_soft_cap(softcap: float, denominator: str) -> None:
    q, k = queries_and_keys(4, 2, 500, 16)
    assert_exact(q, k, 64, softcap=softcap, scale=0.4, denominator=denominator)


@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize(
    ("span", "chosen"),
    [
        pytest.param(32, [3, 8, 0, 3, 5], id="in-any-order"),
        pytest.param(32, list(range(9)), id="all-by-name"),
        pytest.param(150, [1, 0, 1], id="in-pieces"),
    ],
)
def test_chosen_query_spans_are_rows_of_the_dense_result(span: int, chosen: list[int], denominator: str) -> None:
    q, k = queries_and_keys(2, 1, 300, 16)
    dense = span_focus(q, k, span, denominator=denominator, backend="triton")
    some = span_focus(q, k, span, denominator=denominator, query_spans=chosen, backend="triton")
    assert torch.equal(some, dense[:, :, chosen])
    assert_exact(q, k, span, denominator=denominator, query_spans=chosen, average_heads=True)


@pytest.mark.parametrize("span", [64, 128, 150])
def test_a_window_has_the_same_bits_alone_in_any_batch_on_any_run_and_in_any_layout(span: int) -> None:
    q, k = queries_and_keys(2, 1, 330, 32, batch=2)
    together = span_focus(q, k, span, backend="triton")
    assert torch.equal(span_focus(q, k, span, backend="triton"), together)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k)]
    assert strided[0].stride(3) != 1
    assert torch.equal(span_focus(strided[0], strided[1], span, backend="triton"), together)
    for b in range(2):
        assert torch.equal(span_focus(q[b : b + 1], k[b : b + 1], span, backend="triton"), together[b : b + 1])


def test_chosen_heads_have_the_same_bits_as_among_all() -> None:
    q, k = queries_and_keys(6, 2, 400, 32)
    heads = [5, 0, 2]
    some = span_focus(q[:, heads], k[:, [head // 3 for head in heads]], 128, denominator="causal", backend="triton")
    every = span_focus(q, k, 128, denominator="causal", backend="triton")
    assert torch.equal(some, every[:, heads])
    shared = k[:, :1].expand(-1, 2, -1, -1)  # heads 0 and 2 as views
    assert torch.equal(span_focus(q[:, 0:3:2], shared, 128, denominator="causal", backend="triton"), every[:, 0:3:2])


@pytest.mark.parametrize("denominator", ["prior", "causal"])
def test_nan_is_reported_where_it_is_seen_and_stays_in_its_window(denominator: str) -> None:
    q, k = queries_and_keys(2, 1, 500, 16, batch=2)
    k[0, 0, 230] = torch.nan  # in span 2: the spans begin at token 500 % 64 = 52
    q[1, 1, 300] = torch.nan
    assert_exact(q, k, 64, denominator=denominator)
    focus = span_focus(q, k, 64, denominator=denominator, backend="triton")
    assert focus[0, :, -1, :-1].isnan().all()
    assert focus[0, :, 1].isfinite().all()
    assert focus[1, 0].isfinite().all()


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_logits_in_the_hundreds_neither_overflow_nor_vanish(direction: int) -> None:
    length = 400
    q = torch.ones(1, 1, length, 1, device=DEVICE)
    k = torch.linspace(-120, 120, length, device=DEVICE).view(1, 1, length, 1) * direction
    measured = span_focus(q, k, 64, scale=1.0, denominator="causal", backend="triton")
    exact = span_focus(q.double(), k.double(), 64, scale=1.0, denominator="causal", backend="reference")
    torch.testing.assert_close(measured.double(), exact, rtol=1e-4, atol=1e-30)  # a float32 of 120 is right to 1e-5


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_auto_takes_the_kernels_on_a_gpu_and_pytorch_where_they_do_not_apply() -> None:
    q, k = queries_and_keys(4, 2, 400, 32, torch.bfloat16)
    assert torch.equal(span_focus(q, k, 128), span_focus(q, k, 128, backend="triton"))
    q, k = q.double(), k.double()
    torch.testing.assert_close(
        span_focus(q, k, 128).double(), span_focus(q, k, 128, backend="reference"), rtol=1e-5, atol=1e-30
    )


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_addresses_beyond_two_to_the_31_are_right() -> None:
    q, k = queries_and_keys(2, 2, 300, 64, torch.bfloat16)
    far = torch.empty(2**31 + q[0, 0].numel(), dtype=torch.bfloat16, device=DEVICE)
    spread = far.as_strided(q.shape, (0, 2**31, 64, 1))
    for head in (0, 1):
        spread[0, head] = q[0, head]
    assert torch.equal(span_focus(spread, k, 64, backend="triton"), span_focus(q, k, 64, backend="triton"))
    assert torch.equal(span_focus(k, spread, 64, backend="triton"), span_focus(k, q, 64, backend="triton"))


@pytest.mark.parametrize("kibibytes", [227, 163, 99, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_programs_are_cut_to_the_shared_memory_of_the_gpu(
    dtype: torch.dtype, head_dim: int, kibibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_shared_memory", lambda _: kibibytes << 10)
    q, k = queries_and_keys(1, 1, 140, head_dim, dtype)
    for shape in (kernels._far_shape(q), kernels._focus_shape(q)):
        assert (shape.rows + shape.stages * shape.tile) * head_dim * q.element_size() <= kibibytes << 10
    assert_far_exact(q, k, 35)
    assert_exact(q, k, 64)
