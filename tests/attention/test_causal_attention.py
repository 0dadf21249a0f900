"""The output of soft-capped and sliding layers is the reference's, and touches only visible keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longsift.attention import causal_attention, output, reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def queries_keys_values(
    heads: int, kv_heads: int, length: int, head_dim: int, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(batch, heads, length, head_dim, generator=generator)
    k = torch.randn(batch, kv_heads, length, head_dim, generator=generator)
    v = torch.randn(batch, kv_heads, length, head_dim + 1, generator=generator)
    return q, k, v


@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 64, 300, 5000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim"),
    [
        pytest.param(1, 1, 1, 8, id="one-token"),
        pytest.param(4, 4, 63, 8, id="MHA-L63"),
        pytest.param(6, 2, 257, 24, id="GQA3-L257"),
        pytest.param(4, 1, 1001, 64, id="MQA-L1001"),
    ],
)
def test_output_matches_the_reference(
    heads: int, kv_heads: int, length: int, head_dim: int, sliding_window: int | None, softcap: float | None
) -> None:
    q, k, v = queries_keys_values(heads, kv_heads, length, head_dim)
    out = causal_attention(q, k, v, scale=0.3, softcap=softcap, sliding_window=sliding_window)
    exact = reference.causal_attention(
        q.double(), k.double(), v.double(), scale=0.3, softcap=softcap, sliding_window=sliding_window
    )
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 300, 1000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim"),
    [
        pytest.param(4, 4, 1001, 8, id="MHA-L1001"),
        pytest.param(6, 2, 1333, 24, id="GQA3-L1333"),
        pytest.param(4, 1, 1024, 64, id="MQA-L1024"),
    ],
)
def test_stacked_chunks_match_the_reference(
    heads: int, kv_heads: int, length: int, head_dim: int, sliding_window: int
) -> None:
    """The way of a GPU, which any device can go."""
    q, k, v = queries_keys_values(heads, kv_heads, length, head_dim)
    out = torch.full((heads, length, head_dim + 1), torch.nan)
    output._fused_chunks(q[0], k[0], v[0], 0.3, sliding_window, out)
    exact = reference.causal_attention(q.double(), k.double(), v.double(), scale=0.3, sliding_window=sliding_window)
    torch.testing.assert_close(out[None].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[..., :64], id="rows-of-an-odd-number-of-values"),
        pytest.param(lambda x: x.flatten()[1 : 1 + 2 * 3 * 10 * 64].view(2, 3, 10, 64), id="odd-address"),
        pytest.param(lambda x: x[..., :64].transpose(2, 3).contiguous().transpose(2, 3), id="columns-first"),
    ],
)
def test_a_layout_that_fused_kernels_cannot_load_is_copied(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    x = view(torch.randn(2, 3, 10, 65).to(dtype))
    copy = output._aligned(x)
    assert torch.equal(copy, x)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == 0
    assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_as_projections_leave_them_are_not_copied(dtype: torch.dtype) -> None:
    projected = torch.zeros(1, 10, 3 * 64, dtype=dtype)
    q = projected.view(1, 10, 3, 64).transpose(1, 2)
    assert output._aligned(q) is q
    later = q[:, :, 3:]
    assert output._aligned(later) is later


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sliding_window", [None, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_on_a_gpu_matches_the_reference(
    dtype: torch.dtype, sliding_window: int | None, softcap: float | None
) -> None:
    q, k, v = (x.to("cuda", dtype) for x in queries_keys_values(6, 2, 1333, 64, batch=2))
    v = v[..., :64]  # a row is not a multiple of 16 bytes, which the fused kernels would not bear
    options = {"scale": 0.2, "softcap": softcap, "sliding_window": sliding_window}
    out = causal_attention(q, k, v, **options)
    exact = reference.causal_attention(q.double(), k.double(), v.double(), **options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for b in range(2):
        assert torch.equal(causal_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options), out[b : b + 1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 512])
def test_output_on_a_gpu_needs_memory_far_under_one_map(sliding_window: int | None, dtype: torch.dtype) -> None:
    length = 16384
    q, k = (torch.randn(1, heads, length, 64, device="cuda", dtype=dtype) for heads in (4, 2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    causal_attention(q, k, k, scale=0.1, sliding_window=sliding_window)
    growth = torch.cuda.max_memory_allocated() - before
    assert growth < 4 * length * length * dtype.itemsize / 5, f"{growth / 2**20:.0f} MiB"


@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sliding_window", [None, 40])
def test_bfloat16_is_rounded_once_at_the_end(sliding_window: int | None, softcap: float | None) -> None:
    q, k, v = (x.bfloat16() for x in queries_keys_values(4, 2, 300, 32))
    out = causal_attention(q, k, v, scale=0.2, softcap=softcap, sliding_window=sliding_window)
    exact = reference.causal_attention(
        q.double(), k.double(), v.double(), scale=0.2, softcap=softcap, sliding_window=sliding_window
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("sliding_window", [None, 40])
def test_a_window_has_the_same_bits_alone_and_in_any_batch(sliding_window: int | None, softcap: float | None) -> None:
    q, k, v = queries_keys_values(4, 2, 333, 32, batch=3)
    together = causal_attention(q, k, v, scale=0.2, softcap=softcap, sliding_window=sliding_window)
    for b in range(3):
        one = slice(b, b + 1)
        alone = causal_attention(q[one], k[one], v[one], scale=0.2, softcap=softcap, sliding_window=sliding_window)
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
def test_neither_threads_nor_inference_mode_change_the_bits(softcap: float | None) -> None:
    q, k, v = queries_keys_values(4, 2, 700, 32)
    first = causal_attention(q, k, v, scale=0.2, softcap=softcap, sliding_window=100)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with torch.inference_mode():
                again = causal_attention(
                    q.clone(), k.clone(), v.clone(), scale=0.2, softcap=softcap, sliding_window=100
                )
            assert torch.equal(again, first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sliding_window", [None, 20])
def test_the_output_carries_no_gradient_graph(sliding_window: int | None) -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys_values(2, 1, 100, 8))
    assert not causal_attention(q, k, v, scale=0.3, sliding_window=sliding_window).requires_grad


def test_keys_outside_the_sliding_window_are_never_read() -> None:
    q, k, v = queries_keys_values(2, 1, 500, 16)
    full = causal_attention(q, k, v, scale=0.3, sliding_window=20)
    k[:, :, :100] = v[:, :, :100] = torch.nan
    out = causal_attention(q, k, v, scale=0.3, sliding_window=20)
    # A block of rows shares its keys, so a NaN value may reach the rows of its block but none beyond.
    torch.testing.assert_close(out[:, :, 200:], full[:, :, 200:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    q, k, v = queries_keys_values(2, 1, 10, 8)
    with pytest.raises(ValueError, match=message):
        causal_attention(q, k, v, scale=0.3, **options)  # type: ignore[arg-type]
