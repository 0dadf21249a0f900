"""Blockwise PyTorch: exact, in memory that does not grow with the square of the length.

The work of a window is cut into blocks of queries, and each block walks over tiles of keys. A tile of logits
is a few hundred rows by a few hundred keys, so that it stays in a core's own cache through the passes after
its matrix product. On a CPU the blocks are shared out over threads whose operations are single-threaded:
nothing waits for the slowest core inside an operation, and the result does not depend on the number of cores.
The rows of a tile are the queries of all heads that share a key head, so keys are never copied for grouped
heads.

Logits are computed in float32 whatever the inputs are (float64 for float64 inputs). Exponentials are taken
relative to a logit of each row that is near its largest, so that no pass looks for the largest one; where that
overflows, the block is measured again relative to the true largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import TypeVar

import torch
from torch import Tensor

# A tile's rows are the queries of all heads of a group. In float32 it is 2 MiB, a core's L2 cache on recent servers.
TILE_ROWS = 1024
TILE_KEYS = 512
WIDEST_TILE_KEYS = 2048  # where a block has few rows
# Far below 0, exp is up to ten times slower. What is cut off is under 1e-34 of a row's reference probability.
SMALLEST_EXPONENT = -80.0
ALIGNMENT = 64  # tiles of other widths take up to a tenth longer

Block = TypeVar("Block")


def far_rows(
    q: Tensor,
    k: Tensor,
    distance: int,
    *,
    rows: Tensor | None = None,
    skip: int = 0,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Far mass and squares of every query, each (batch, heads, rows) float32; see `longsift.attention`."""
    batch, heads, count, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(batch, kv_heads, -1, *q.shape[2:])  # (batch, kv_heads, group, rows, head_dim)
    positions = torch.arange(count, device=q.device) if rows is None else rows
    step = _rows(heads // kv_heads)
    starts = range(0, count, step)[::-1]  # the longest first, so that the last block to end is a short one
    sums = torch.empty(2, batch, kv_heads, heads // kv_heads, count, device=q.device)
    for b, h in product(range(batch), range(kv_heads)):
        keys = _with_ones(k[b, h])

        def measure(start: int, queries: Tensor = grouped[b, h], keys: Tensor = keys) -> Tensor:
            block = _Rows(queries[:, start : start + step], scale, softcap)
            return _far_block(block, keys, positions[start : start + step], distance, skip, sliding_window)

        for start, part in zip(starts, map_blocks(measure, starts, q.device), strict=True):
            sums[:, b, h, :, start : start + step] = part
    mass, squares = sums.flatten(2, 3)
    return mass, squares


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
    # Wider tiles for blocks of few rows, so that an operation has about as much to do.
    widest = min(TILE_KEYS * TILE_ROWS // (min(rows, span) * (heads // kv_heads)), WIDEST_TILE_KEYS)
    widest = max(widest, TILE_KEYS, span)
    # A span without prior spans keeps its zeros. The longest blocks first, as above.
    measured = [i for i, j in enumerate(query_spans) if denominator == "causal" or j > 0]
    measured.sort(key=lambda i: -query_spans[i])
    blocks = [(i, offset) for i in measured for offset in range(0, span, rows)]
    focus = torch.zeros(batch, kv_heads, heads // kv_heads, len(query_spans), n_spans, device=q.device)
    for b, h in product(range(batch), range(kv_heads)):
        keys = _with_ones(k[b, h])

        def measure(block: tuple[int, int], queries: Tensor = grouped[b, h], keys: Tensor = keys) -> Tensor:
            i, offset = block
            span_start = lead + query_spans[i] * span
            start, end = span_start + offset, span_start + min(offset + rows, span)
            own_end = span_start if denominator == "prior" else end
            block_rows = _Rows(queries[:, start:end], scale, softcap, widest)
            return _focus_block(block_rows, keys[:own_end], start, lead, span)

        for (i, _), part in zip(blocks, map_blocks(measure, blocks, q.device), strict=True):
            focus[b, h, :, i, : part.shape[1]] += part
    return focus.flatten(1, 2)


def _far_block(
    queries: _Rows, keys: Tensor, positions: Tensor, distance: int, skip: int, sliding_window: int | None
) -> Tensor:
    """Σ P and Σ P² over the far keys of each query at `positions`, ascending: (2, group, rows) in float64."""
    query = positions[:, None]
    start, end = int(positions[0]), int(positions[-1]) + 1
    # The keys before `all_far` are far from every row; those from `some_far` on are far from none.
    # Those before `skip` are left out.
    all_far, some_far = start - distance + 1, end - distance
    # The keys before `some_seen` are seen by no row any more; those from `all_seen` on still by every row.
    window = end if sliding_window is None else sliding_window
    some_seen, all_seen = max(start - window + 1, 0), end - window
    bounds = list(_tiles(some_seen, all_seen, all_far, some_far, start, end, skip))
    tiles: list[tuple[Tensor, Tensor | None]] = []
    nearest = 0  # the first tile of the queries' own positions
    for first, last in bounds:
        nearest += first < start
        key, hidden = torch.arange(first, last, device=keys.device), None
        if last - 1 > start:
            hidden = key > query
        if first < all_seen:
            hidden = (key <= query - window) if hidden is None else hidden | (key <= query - window)
        tiles.append((keys[first:last], hidden))

    def sums() -> Tensor:
        total, far, norm = keys.new_zeros(3, len(tiles), queries.count)
        for i, ((first, last), (tile, hidden)) in enumerate(zip(bounds, tiles, strict=True)):
            e = queries.exponentials(tile, hidden)
            torch.sum(e, -1, out=total[i])
            if skip <= first < some_far:
                if last > all_far or hidden is not None:
                    near = torch.arange(first, last, device=keys.device) > query - distance
                    queries.by_head(e).masked_fill_(near if hidden is None else near | hidden, 0.0)
                    torch.sum(e, -1, out=far[i])
                else:
                    far[i] = total[i]
                torch.linalg.vector_norm(e, dim=-1, out=norm[i])
        return torch.stack((total, far, norm)).double()

    total, far, norm = _within_range(queries, tiles, nearest, sums)
    mass = total.sum(0)
    per_row = torch.stack((far.sum(0) / mass, norm.square().sum(0) / mass.square()))
    return per_row.view(2, queries.group, -1)


def _focus_block(queries: _Rows, keys: Tensor, start: int, lead: int, span: int) -> Tensor:
    """Mass (group, key spans) of the queries at `start` on the spans of the keys from `lead` on.

    When the keys go beyond the start of the queries' own span, they end with the last row, and the own span is
    measured too, each query blind to the keys after it.
    """
    end = len(keys)
    own = lead + (min(start, end) - lead) // span * span  # start of the queries' own span
    step = queries.widest // span * span
    tiles: list[tuple[Tensor, Tensor | None]] = [(keys[first:last], None) for first, last in _pieces(0, lead)]
    leading = len(tiles)
    tiles += [(keys[first : min(first + step, own)], None) for first in range(lead, own, step)]
    if own < end:
        query = torch.arange(end - queries.count // queries.group, end, device=keys.device)[:, None]
        tiles.append((keys[own:], torch.arange(own, end, device=keys.device) > query))

    def sums() -> Tensor:
        parts = []
        for i, (tile, hidden) in enumerate(tiles):
            e = queries.exponentials(tile, hidden)
            width = span if i >= leading and hidden is None else len(tile)
            parts.append(e.view(queries.count, -1, width).sum(-1))
        return torch.cat(parts, 1)

    parts = _within_range(queries, tiles, len(tiles) - 1, sums).double()
    mass = parts[:, leading:] / parts.sum(1, keepdim=True)
    return mass.view(queries.group, -1, mass.shape[1]).sum(1).to(keys.dtype)


def _within_range(
    queries: _Rows, tiles: Sequence[tuple[Tensor, Tensor | None]], nearest: int, sums: Callable[[], Tensor]
) -> Tensor:
    """Sums of exponentials relative to a logit of each row that leaves them in floating-point range.

    The largest logit of the tiles from `nearest` on, in which every query sees a key, is close enough to the row's
    largest in all but extreme attention, and saves a pass over the others; sums that overflow all the same are taken
    again from the true largest.
    """
    queries.refer_to(tiles[nearest:])
    result = sums()
    if not bool(result.isfinite().all()):
        queries.refer_to(tiles)
        result = sums()
    return result


class _Rows:
    """A block of queries, all heads of a group, as the rows of one matrix product with a tile of keys.

    Each row's logits are relative to a reference of its own. Subtracting it costs no pass: the queries have one
    more column, its negative, and the keys one more, of ones.

    Args:
        q: queries (group, positions, head_dim).
        widest: the largest number of keys of a tile.
    """

    def __init__(self, q: Tensor, scale: float, softcap: float | None, widest: int = TILE_KEYS) -> None:
        self.group, self.count, self.widest = q.shape[0], q.shape[0] * q.shape[1], widest
        self._softcap = softcap
        factor = scale if softcap is None else scale / softcap
        self._q = q.new_zeros(self.count, q.shape[2] + 1, dtype=compute_dtype(q))
        self._q[:, :-1] = q.flatten(0, 1)
        self._q[:, :-1] *= factor
        self._reference = self._q.new_zeros(self.count, 1)
        # One tile for all: a new one each time would be given back to the system and faulted in again.
        self._tile = self._q.new_empty(self.count * widest)

    def by_head(self, tile: Tensor) -> Tensor:
        """A tile (rows, keys) as (group, positions, keys)."""
        return tile.view(self.group, -1, tile.shape[1])

    def exponentials(self, keys: Tensor, hidden: Tensor | None = None) -> Tensor:
        """exp(logits - reference) for keys with ones (keys, head_dim + 1): (rows, keys), valid until the next call.

        `hidden` (positions, keys) is True where a query must not see a key.
        """
        return self._logits(keys, hidden).clamp_(min=SMALLEST_EXPONENT).exp_()

    def refer_to(self, tiles: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Take each row's largest logit among those of `tiles` as its reference."""
        peaks = [self._logits(keys, hidden).amax(-1, keepdim=True) for keys, hidden in tiles]
        self._reference += torch.stack(peaks).amax(0)
        if self._softcap is None:
            self._q[:, -1:] = -self._reference

    def _logits(self, keys: Tensor, hidden: Tensor | None) -> Tensor:
        logits = torch.mm(self._q, keys.T, out=self._tile[: self.count * len(keys)].view(self.count, -1))
        if self._softcap is not None:
            logits.tanh_().mul_(self._softcap).sub_(self._reference)
        if hidden is not None:
            self.by_head(logits).masked_fill_(hidden, -torch.inf)
        return logits


def _with_ones(k: Tensor) -> Tensor:
    """Keys (keys, head_dim) in the type of computation, with one more column of ones."""
    keys = k.new_ones(k.shape[0], k.shape[1] + 1, dtype=compute_dtype(k))
    keys[:, :-1] = k
    return keys


def _tiles(
    some_seen: int, all_seen: int, all_far: int, some_far: int, start: int, end: int, skip: int
) -> Iterator[tuple[int, int]]:
    """Tiles of the keys [some_seen, end), cut so that few of them hold both sides of a boundary and need a mask.

    None holds both sides of `skip` or of `start`.
    """
    aligned = [boundary // ALIGNMENT * ALIGNMENT for boundary in (all_far, some_far + ALIGNMENT - 1)]
    if some_seen:
        aligned.append(-(-all_seen // ALIGNMENT) * ALIGNMENT)
    cuts = sorted({min(max(boundary, some_seen), end) for boundary in (some_seen, *aligned, start, end, skip)})
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


def compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which logits of these queries are computed."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def map_blocks(measure: Callable[[Block], Tensor], blocks: Sequence[Block], device: torch.device) -> Iterator[Tensor]:
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
