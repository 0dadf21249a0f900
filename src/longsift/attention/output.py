"""Exact causal attention output, for layers that plain SDPA could only run with a length × length mask.

A layer with neither a soft cap nor a sliding window goes to PyTorch's fused SDPA. A sliding layer touches little
more than `sliding_window` keys a query at any length: on a GPU, chunks of queries are stacked for a few fused calls;
on a CPU, as for the layers with a soft cap, blocks of queries that stay in a core's own cache are shared out over
threads of one core each, which is about three times as fast as the fused call there.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longsift.attention.cpu import compute_dtype, map_blocks

BLOCK_ROWS = 256  # of a block on a CPU: the queries of all heads that share a key head
SMALLEST_BLOCK = 16  # positions
CPU_BLOCK_LOGITS = 1 << 21  # of a block: 8 MiB of float32
GPU_BLOCK_LOGITS = 1 << 26
ALIGNMENT = 16  # bytes that the fused kernels of a GPU load at once


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Exact causal attention output, without a gradient.

    Args:
        q: queries, (batch, heads, length, head_dim).
        k: keys, (batch, kv_heads, length, head_dim); heads must be a multiple of kv_heads.
        v: values, (batch, kv_heads, length, value_dim).
        scale: factor of the logits.
        softcap: logits become softcap·tanh(logits/softcap) when given.
        sliding_window: query n sees the keys n - sliding_window + 1 … n (as in transformers) when given.

    Returns:
        (batch, heads, length, value_dim) in the dtype of q.

    Raises:
        ValueError: a sliding window or soft cap that is not positive.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive; got {softcap}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token; got {sliding_window}")
    q, k, v = q.detach(), k.detach(), v.detach()
    if q.device.type != "cpu":
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
    length = q.shape[2]
    window = length if sliding_window is None else min(sliding_window, length)
    if softcap is None and window == length:
        return _plain(q, k, v, scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):  # one window at a time: its output must not depend on the rest of the batch
        if softcap is None and q.device.type != "cpu":
            _fused_chunks(q[b], k[b], v[b], scale, window, out[b])
        else:
            _blocks(q[b], k[b], v[b], scale, softcap, window, out[b])
    return out


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows do not all begin at a multiple of ALIGNMENT bytes.

    PyTorch 2.11 looks at some of the strides before it takes a fused kernel, at no address, and at nothing of the
    values; a load that is not aligned then ends in "misaligned address", and the process can use the GPU no more.
    """
    unit = ALIGNMENT // x.element_size()
    rows = x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1])
    if rows and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and q.dtype == torch.float32 and group > 1:
        # The one fused kernel for float32 has no grouped heads, and the way without it holds the whole map.
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def _fused_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, out: Tensor) -> None:
    """Sliding attention of a window, `out` (heads, length, value_dim), in three fused calls."""
    heads, length, _ = q.shape
    kv_heads = k.shape[0]

    def attend(start: int, rows: int, chunks: int) -> None:
        """`chunks` chunks of `rows` queries from `start` on, each to the keys up to its last row."""
        keys = min(start, window) + rows
        end = start + chunks * rows
        # (chunks, kv_heads, group·rows, head_dim): the heads that share keys are rows of one product
        queries = q[:, start:end].reshape(kv_heads, -1, chunks, rows, q.shape[2]).permute(2, 0, 1, 3, 4)
        keys_of_chunks, values_of_chunks = (
            x[:, end - keys - (chunks - 1) * rows :].as_strided(
                (chunks, kv_heads, keys, x.shape[2]), (rows * x.stride(1), x.stride(0), x.stride(1), x.stride(2))
            )
            for x in (k, v)
        )
        query = torch.arange(keys - rows, keys, device=q.device)[:, None]
        key = torch.arange(keys, device=q.device)
        seen = ((key <= query) & (key > query - window)).repeat(heads // kv_heads, 1)
        part = scaled_dot_product_attention(
            queries.flatten(2, 3), keys_of_chunks, values_of_chunks, attn_mask=seen, scale=scale
        )
        by_head = part.view(chunks, kv_heads, -1, rows, out.shape[2]).permute(1, 2, 0, 3, 4)
        out[:, start:end] = by_head.reshape(heads, end - start, -1)

    # Short chunks waste less on keys that are masked, long ones less on reading keys again.
    rows = max(window // 2, min(window, SMALLEST_BLOCK))
    chunks, rest = divmod(length - window, rows)
    attend(0, window, 1)
    if chunks:
        attend(window, rows, chunks)
    if rest:
        attend(length - rest, rest, 1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int, out: Tensor) -> None:
    """Attention of a window, `out` (heads, length, value_dim), a block of queries at a time."""
    length = q.shape[1]
    kv_heads = k.shape[0]
    group = q.shape[0] // kv_heads
    grouped = q.view(kv_heads, group, *q.shape[1:])
    if q.device.type == "cpu":
        together, logits = 1, CPU_BLOCK_LOGITS
        rows = min(BLOCK_ROWS // group, window // 4)
    else:
        together, logits = kv_heads, GPU_BLOCK_LOGITS
        rows = max(window, 64)
    rows = max(min(rows, logits // (together * group * window)), SMALLEST_BLOCK)

    def attend(block: tuple[int, int]) -> Tensor:
        head, start = block
        of = slice(head, head + together)
        end = min(start + rows, length)
        first = max(start - window, 0)
        return _attend(grouped[of, :, start:end], k[of, first:end], v[of, first:end], scale, softcap, window)

    blocks = list(product(range(0, kv_heads, together), range(0, length, rows)))
    by_key_head = out.view(kv_heads, group, *out.shape[1:])
    for (head, start), part in zip(blocks, map_blocks(attend, blocks, q.device), strict=True):
        by_key_head[head : head + together, :, start : start + rows] = part


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int) -> Tensor:
    """Output (kv_heads, group, rows, value_dim) of queries (kv_heads, group, rows, head_dim), the last of the keys."""
    kv_heads, group, rows, _ = q.shape
    keys = k.shape[1]
    dtype = compute_dtype(q)
    factor = scale if softcap is None else scale / softcap
    logits = torch.bmm(q.flatten(1, 2).to(dtype) * factor, k.to(dtype).transpose(1, 2))
    if softcap is not None:
        logits.tanh_().mul_(softcap)
    by_position = logits.view(kv_heads * group, rows, keys)
    key = torch.arange(keys, device=q.device)
    query = key[keys - rows :, None]
    by_position[..., keys - rows :].masked_fill_(key[keys - rows :] > query, -torch.inf)
    old = max(keys - window, 0)  # keys that the last query does not see any more
    by_position[..., :old].masked_fill_(key[:old] <= query - window, -torch.inf)
    return torch.bmm(logits.softmax(-1), v.to(dtype)).view(kv_heads, group, rows, -1)
