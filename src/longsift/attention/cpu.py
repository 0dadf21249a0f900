"""Blockwise PyTorch: exact, in memory that does not grow with the square of the length.

The work of a window is cut into blocks of queries, and each block walks over tiles of keys. A tile of logits
is a few hundred rows by a few hundred keys, so that it stays in a core's own cache through the passes after
its matrix product. On a CPU the blocks are shared out over threads whose operations are single-threaded:
nothing waits for the slowest core inside an operation, and the result does not depend on the number of cores.
The rows of a tile are the queries of all heads that share a key head, so keys are never copied for grouped
heads.

Logits are computed in float32 whatever the inputs are (float64 for float64 inputs), and the softmax is the
online one: each row keeps its running maximum, and sums made under an older maximum are rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# A tile's rows are the queries of all heads of a group. In float32 it is 1 MiB: half of a core's L2 cache.
TILE_ROWS = 512
TILE_KEYS = 512
# Far below the peak, exp is up to ten times slower. What is cut off is under 1e-34 of a row's largest probability.
SMALLEST_EXPONENT = -80.0
ALIGNMENT = 64  # tiles of other widths take up to a tenth longer
OUTPUT_BLOCK_ENTRIES = 1 << 21  # logits of a block of `causal_attention`: 8 MiB of float32

Block = TypeVar("Block")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Exact causal attention output, for layers that plain SDPA could only run with a length × length mask.

    A layer with neither a soft cap nor a sliding window goes to PyTorch's fused SDPA. Otherwise blocks of
    queries attend to the keys they can see: a sliding layer touches about `sliding_window` keys a query at
    any length.

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
    length = q.shape[2]
    if softcap is None and (sliding_window is None or sliding_window >= length):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    window = length if sliding_window is None else min(sliding_window, length)
    # As many rows as the budget allows, but no more than a window: a block computes at most twice its need.
    rows = min(max(OUTPUT_BLOCK_ENTRIES // (q.shape[1] * window), 16), max(window, 64), length)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):  # one window at a time: its output must not depend on the rest of the batch
        for start in range(0, length, rows):
            end = min(start + rows, length)
            first = max(0, start - window + 1)
            out[b, :, start:end] = _attend_block(
                q[b, :, start:end], k[b, :, first:end], v[b, :, first:end], scale, softcap, window
            )
    return out


def _attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int) -> Tensor:
    """Output (heads, rows, value_dim) of the last `rows` positions of the keys (kv_heads, keys, head_dim)."""
    heads, rows, _ = q.shape
    kv_heads, keys, _ = k.shape
    grouped = q.reshape(kv_heads, -1, q.shape[2]).to(_compute_dtype(q))  # (kv_heads, group·rows, head_dim)
    factor = scale if softcap is None else scale / softcap
    logits = torch.bmm(grouped * factor, k.to(grouped.dtype).transpose(1, 2))
    if softcap is not None:
        logits = torch.tanh(logits) * softcap
    query = torch.arange(keys - rows, keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)[None, :]
    hidden = (key > query) | (key <= query - window)
    p = logits.view(kv_heads, -1, rows, keys).masked_fill_(hidden, -torch.inf).softmax(-1)
    return torch.bmm(p.view(kv_heads, -1, keys), v.to(p.dtype)).view(heads, rows, -1)


def far_statistics(
    q: Tensor, k: Tensor, distance: int, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Strength and variance, each (batch, heads) float32; see `longsift.attention.far_statistics`."""
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(batch, kv_heads, -1, *q.shape[2:])  # (batch, kv_heads, group, length, head_dim)
    rows = _rows(heads // kv_heads)

    def measure(block: tuple[int, int, int]) -> Tensor:
        b, h, start = block
        queries = grouped[b, h, :, start : start + rows]
        return _far_block(queries, k[b, h], start, distance, scale, softcap)

    # The longest first, so that the last block to end is a short one.
    starts = reversed(range(0, length, rows))
    blocks = [(b, h, start) for start in starts for b in range(batch) for h in range(kv_heads)]
    sums = torch.zeros(2, batch, kv_heads, heads // kv_heads, dtype=torch.float64)
    for (b, h, _), part in zip(blocks, _map_blocks(measure, blocks, q.device), strict=True):
        sums[:, b, h] += part
    mass, squares = sums.flatten(2)
    entries = length * length
    variance = (squares - mass.square() / entries) / (entries - 1)
    return (mass / length).float().to(q.device), variance.float().to(q.device)


def span_focus(
    q: Tensor,
    k: Tensor,
    span: int,
    *,
    scale: float,
    softcap: float | None = None,
    denominator: str = "prior",
    query_spans: Sequence[int],
) -> Tensor:
    """Mass from query to key spans, (batch, heads, Q, J) float32; see `longsift.attention.span_focus`."""
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(batch, kv_heads, -1, *q.shape[2:])  # (batch, kv_heads, group, length, head_dim)
    n_spans, lead = length // span, length % span
    rows = max(_rows(heads // kv_heads) * TILE_KEYS // max(span, TILE_KEYS), 1)

    def measure(block: tuple[int, int, int, int]) -> Tensor:
        b, h, i, offset = block
        span_start = lead + query_spans[i] * span
        start, end = span_start + offset, span_start + min(offset + rows, span)
        own_end = span_start if denominator == "prior" else end
        return _focus_block(grouped[b, h, :, start:end], k[b, h, :own_end], start, lead, span, scale, softcap)

    # A span without prior spans keeps its zeros. The longest blocks first, as above.
    measured = [i for i, j in enumerate(query_spans) if denominator == "causal" or j > 0]
    measured.sort(key=lambda i: -query_spans[i])
    blocks = [
        (b, h, i, offset)
        for i in measured
        for b in range(batch)
        for h in range(kv_heads)
        for offset in range(0, span, rows)
    ]
    focus = torch.zeros(batch, kv_heads, heads // kv_heads, len(query_spans), n_spans, device=q.device)
    for (b, h, i, _), part in zip(blocks, _map_blocks(measure, blocks, q.device), strict=True):
        focus[b, h, :, i, : part.shape[1]] += part
    return focus.flatten(1, 2)


def _far_block(q: Tensor, k: Tensor, start: int, distance: int, scale: float, softcap: float | None) -> Tensor:
    """Σ P and Σ P² over the far pairs of q (group, rows, head_dim) at `start`: (2, group) in float64."""
    group, rows, _ = q.shape
    end = start + rows
    # The keys before `all_far` are far from every row; those from `some_far` on are far from none.
    all_far, some_far = start - distance + 1, end - distance
    softmax = _OnlineSoftmax(q, scale, softcap)
    far = torch.zeros_like(softmax.total)
    far_squares = torch.zeros_like(softmax.total)
    query = torch.arange(start, end, device=q.device)[:, None]
    for first, last in _tiles(all_far, some_far, start, end):
        hidden = None
        if last - 1 > start:
            hidden = torch.arange(first, last, device=q.device) > query
        e, rescale = softmax.exponentials(k[first:last], hidden)
        far *= rescale
        far_squares *= rescale.square()
        if first < some_far:
            if last > all_far:
                near = torch.arange(first, last, device=q.device) > query - distance
                e.view(group, rows, -1).masked_fill_(near, 0.0)
            far += e.sum(-1, keepdim=True)
            far_squares += torch.linalg.vector_norm(e, dim=-1, keepdim=True).square()
    per_row = torch.stack((far / softmax.total, far_squares / softmax.total.square()))
    return per_row.view(2, group, rows).cpu().double().sum(-1)


def _focus_block(q: Tensor, k: Tensor, start: int, lead: int, span: int, scale: float, softcap: float | None) -> Tensor:
    """Mass (group, key spans) of q (group, rows, head_dim) at `start` on the spans of k from `lead` on.

    When k goes beyond the start of the queries' own span, it ends with their last row, and the own span is
    measured too, each query blind to the keys after it.
    """
    group, rows, _ = q.shape
    keys = k.shape[0]
    own = lead + (min(start, keys) - lead) // span * span  # start of the queries' own span
    step = max(TILE_KEYS // span, 1) * span
    tiles = [(first, min(first + step, own)) for first in range(lead, own, step)]
    softmax = _OnlineSoftmax(q, scale, softcap, max(TILE_KEYS, span))
    for first, last in _pieces(0, lead):
        softmax.exponentials(k[first:last])
    parts, peaks = [], []
    for first, last in tiles:
        e, _ = softmax.exponentials(k[first:last])
        parts.append(e.view(group * rows, -1, span).sum(-1))
        peaks.append(softmax.peak)
    if own < keys:
        query = torch.arange(start, start + rows, device=q.device)[:, None]
        e, _ = softmax.exponentials(k[own:], torch.arange(own, keys, device=q.device) > query)
        parts.append(e.sum(-1, keepdim=True))
        peaks.append(softmax.peak)
    weights = [(peak - softmax.peak).exp() / softmax.total for peak in peaks]
    mass = torch.cat([part * weight for part, weight in zip(parts, weights, strict=True)], 1)
    return mass.view(group, rows, -1).sum(1)


class _OnlineSoftmax:
    """Softmax over keys that come a tile at a time; a tile's exponentials are relative to the peak so far.

    Attributes:
        peak: running maximum of each row's logits, (group·rows, 1).
        total: sum of exp(logit - peak) over the keys seen so far, (group·rows, 1).
    """

    def __init__(self, q: Tensor, scale: float, softcap: float | None, widest: int = TILE_KEYS) -> None:
        self._softcap = softcap
        factor = scale if softcap is None else scale / softcap
        self._group = q.shape[0]
        self._q = q.to(_compute_dtype(q)).mul(factor).flatten(0, 1)  # (group·rows, head_dim)
        self.peak = self._q.new_full((self._q.shape[0], 1), -torch.inf)
        self.total = torch.zeros_like(self.peak)
        # One tile for all: a new one each time would be given back to the system and faulted in again.
        self._tile = self._q.new_empty(self._q.shape[0] * widest)

    def exponentials(self, k: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """exp(logits - peak) of the next keys (keys, head_dim), and the factor for older sums.

        The exponentials (group·rows, keys) are valid until the next call; keys must be at most `widest`.
        `hidden` (rows, keys) is True where a query must not see a key; in the first tile each must see one.
        """
        rows, keys = self._q.shape[0], k.shape[0]
        e = torch.mm(self._q, k.to(self._q.dtype).T, out=self._tile[: rows * keys].view(rows, keys))
        if self._softcap is not None:
            e.tanh_().mul_(self._softcap)
        if hidden is not None:
            e.view(self._group, -1, keys).masked_fill_(hidden, -torch.inf)
        peak = torch.maximum(self.peak, e.amax(-1, keepdim=True))
        rescale = (self.peak - peak).exp_()
        e.sub_(peak).clamp_(min=SMALLEST_EXPONENT).exp_()
        self.peak = peak
        self.total = self.total.mul_(rescale).add_(e.sum(-1, keepdim=True))
        return e, rescale


def _tiles(all_far: int, some_far: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Tiles of the keys [0, end), cut so that few of them hold both sides of a boundary and need a mask."""
    boundaries = (all_far // ALIGNMENT * ALIGNMENT, -(-some_far // ALIGNMENT) * ALIGNMENT, start, end)
    cuts = sorted({0, *(min(max(boundary, 0), end) for boundary in boundaries)})
    for first, last in pairwise(cuts):
        yield from _pieces(first, last)


def _pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Split [first, last) into the fewest tiles of at most TILE_KEYS, about equally wide."""
    if first < last:
        pieces = -(-(last - first) // TILE_KEYS)
        width = -(-(last - first) // (pieces * ALIGNMENT)) * ALIGNMENT
        for at in range(first, last, width):
            yield at, min(at + width, last)


def _rows(group: int) -> int:
    """Positions of a block of queries of `group` heads, TILE_ROWS rows or about that."""
    return max(TILE_ROWS // group // 16, 1) * 16


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _map_blocks(measure: Callable[[Block], Tensor], blocks: Sequence[Block], device: torch.device) -> Iterator[Tensor]:
    """Measure the blocks, in order; on a CPU in as many threads as PyTorch may use, one core each."""
    if device.type != "cpu":
        yield from map(measure, blocks)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=_prepare_thread) as pool:
            yield from pool.map(measure, blocks)
    finally:
        torch.set_num_threads(threads)  # the process-wide copy of the setting, which the threads changed


def _prepare_thread() -> None:
    """Settings of the calling thread alone: one core, and products too small for a normal number are 0."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # squares of small probabilities; as denormals they would be slow
