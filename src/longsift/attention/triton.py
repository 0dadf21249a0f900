"""Triton kernels, for GPUs: exact, in memory that does not grow with the square of the length.

One program measures one query span (or a piece of a long one) of one head, and walks over the keys twice: first
for the largest logit and the normaliser of each row, then for the mass on each key span. A span longer than a
tile is cut into equal pieces, whose masses are added up at the end; shorter ones lie side by side in a tile.

Products take the inputs as they are (bfloat16 and float16 on tensor cores, float32 in full) and are accumulated
in float32. Logits carry a factor log2(e), so that exponentials are powers of 2. Each program alone writes its part
of the result, in one order: the bits depend neither on the run nor on what else is in the batch.

Names: `b_` a block of values, `o_` offsets, `m_` a mask, `p_` a pointer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_HEAD_DIM = 256
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_PRODUCT = 16  # the least side of a tile that tensor cores take


def refusal(q: Tensor) -> str | None:
    """Why these queries cannot be measured here; None when they can."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on a GPU; got {q.device}"
    if q.dtype not in SUPPORTED_DTYPES:
        return f"takes float16, bfloat16 and float32; got {q.dtype}"
    if q.shape[3] > LARGEST_HEAD_DIM:
        return f"takes head_dim up to {LARGEST_HEAD_DIM}; got {q.shape[3]}"
    return None


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
    batch, heads, length, head_dim = q.shape
    n_spans = length // span
    every = query_spans == range(n_spans)
    tile, warps, stages = _tile(q)
    pieces = -(-span // tile)
    width = -(-span // pieces)
    padded_width = triton.next_power_of_2(width)
    # Rows and columns of a span's pieces: (batch, heads, Q, pieces, J, pieces)
    parts = torch.empty(batch, heads, len(query_spans), pieces, n_spans, pieces, dtype=torch.float32, device=q.device)
    logit_scale = scale if softcap is None else scale / softcap
    with torch.cuda.device_of(q):
        _span_focus_kernel[(len(query_spans) * pieces * batch * heads,)](
            q,
            k,
            None if every else _longest_first(query_spans, q.device),
            parts,
            *q.stride(),
            *k.stride(),
            heads,
            heads // k.shape[1],
            batch * heads,
            length,
            span,
            width,
            len(query_spans),
            logit_scale if softcap is not None else logit_scale * math.log2(math.e),
            0.0 if softcap is None else softcap * math.log2(math.e),
            HEAD_DIM=head_dim,
            PADDED_DIM=max(triton.next_power_of_2(head_dim), SMALLEST_PRODUCT),
            ROWS=max(padded_width, SMALLEST_PRODUCT),
            TILE=tile,
            PIECES=pieces,
            PADDED_WIDTH=padded_width,
            EVEN=pieces * padded_width == span,
            EVERY=every,
            CAUSAL=denominator == "causal",
            SOFTCAP=softcap is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # the latter concerns float32 alone
            num_warps=warps,
            num_stages=stages,
        )
    return parts.sum((3, 5)) if pieces > 1 else parts[:, :, :, 0, :, 0]


def _longest_first(query_spans: Sequence[int], device: torch.device) -> Tensor:
    """Where each program writes and which span it measures, (2, Q), so that the last to end is a short one.

    Its copy to the GPU costs as much as a small kernel, so the spans of a whole window go without.
    """
    order = sorted(range(len(query_spans)), key=lambda i: -query_spans[i])
    return torch.tensor([order, [query_spans[i] for i in order]], dtype=torch.int32, device=device)


def _tile(q: Tensor) -> tuple[int, int, int]:
    """Side of a tile, warps of a program and stages of its pipeline: what fits a processor's shared memory."""
    wide = q.shape[3] > 128
    if q.dtype == torch.float32:
        return (32 if wide else 64), 4, 1
    return (64, 4, 2) if wide else (128, 8, 3)


@triton.jit
def _tile_logits(
    b_q,  # [ROWS, PADDED_DIM]
    p_k,
    o_key,  # [TILE]
    m_key,  # [TILE]: the keys to load
    stride_kl,
    stride_kd,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits · log2(e) of a tile of keys, [ROWS, TILE]; without MASKED, every key is there."""
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_k + o_key.to(tl.int64)[None, :] * stride_kl + o_d[:, None] * stride_kd  # [PADDED_DIM, TILE]
    if MASKED:
        b_k = tl.load(p_tile, mask=m_key[None, :] & (o_d < HEAD_DIM)[:, None], other=0.0)
    elif HEAD_DIM == PADDED_DIM:
        b_k = tl.load(p_tile)
    else:
        b_k = tl.load(p_tile, mask=(o_d < HEAD_DIM)[:, None], other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both infinities too
        b_s = softcap * (1.0 - 2.0 / (tl.exp2(b_s * 2.885390081777927) + 1.0))
    return b_s


@triton.jit
def _add_tile(b_s, b_max, b_sum):
    """The largest logit and the sum of exponentials of each row, with one more tile."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
    return b_new, b_sum


@triton.jit
def _span_focus_kernel(
    p_q,
    p_k,
    p_work,  # None when EVERY query span is measured
    p_out,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    heads,
    group,
    batch_heads,
    length,
    span,
    width,
    n_query_spans,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    EVERY: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    piece = program // batch_heads % PIECES
    i_work = program // batch_heads // PIECES
    i_batch = program % batch_heads // heads
    i_head = program % heads
    if EVERY:
        slot = n_query_spans - 1 - i_work
        query_span = slot
    else:
        slot = tl.load(p_work + i_work)
        query_span = tl.load(p_work + n_query_spans + i_work)
    n_spans = length // span
    lead = length % span
    span_start = lead + query_span * span

    first_row = span_start + piece * width
    o_row = first_row + tl.arange(0, ROWS)
    m_row = o_row < tl.minimum(first_row + width, span_start + span)
    o_d = tl.arange(0, PADDED_DIM)
    p_q += i_batch.to(tl.int64) * stride_qb + i_head.to(tl.int64) * stride_qh
    p_k += i_batch.to(tl.int64) * stride_kb + (i_head // group).to(tl.int64) * stride_kh
    b_q = tl.load(
        p_q + o_row.to(tl.int64)[:, None] * stride_ql + o_d[None, :] * stride_qd,
        mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :],
        other=0.0,
    )

    # 1. The largest logit and the normaliser of each row, over the keys [0, o_end)
    if CAUSAL:
        o_end = o_row + 1
        any_sees = tl.minimum(first_row + width, span_start + span)
        all_see = tl.minimum(first_row + 1, any_sees)
    else:
        o_end = tl.zeros([ROWS], tl.int32) + span_start
        all_see = span_start
        any_sees = span_start
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    o_tile = tl.arange(0, TILE)
    unmasked = all_see // TILE * TILE
    for start in range(0, unmasked, TILE):
        o_key = start + o_tile
        b_s = _tile_logits(
            b_q, p_k, o_key, o_key < length, stride_kl, stride_kd, scale, softcap,
            HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_max, b_sum = _add_tile(b_s, b_max, b_sum)
    for start in range(unmasked, any_sees, TILE):
        o_key = start + o_tile
        b_s = _tile_logits(
            b_q, p_k, o_key, o_key < length, stride_kl, stride_kd, scale, softcap,
            HEAD_DIM, PADDED_DIM, True, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_s = tl.where(o_key[None, :] < o_end[:, None], b_s, -float("inf"))
        b_max, b_sum = _add_tile(b_s, b_max, b_sum)
    # Rows that are not there get no mass.
    b_normaliser = tl.where(m_row, b_max + tl.log2(b_sum), float("inf"))

    # 2. The mass on each piece of a key span; a tile holds TILE / PADDED_WIDTH of them side by side
    per_tile: tl.constexpr = TILE // PADDED_WIDTH
    o_piece = tl.arange(0, per_tile)
    all_pieces = n_spans * PIECES
    row = ((i_batch * heads + i_head).to(tl.int64) * n_query_spans + slot) * PIECES + piece
    p_out += row * all_pieces
    before = query_span * PIECES
    visible = before + PIECES if CAUSAL else before
    unmasked_pieces = before // per_tile * per_tile if EVEN else 0
    for start in range(0, unmasked_pieces, per_tile):
        o_key = lead + start * PADDED_WIDTH + o_tile
        b_s = _tile_logits(
            b_q, p_k, o_key, o_key < length, stride_kl, stride_kd, scale, softcap,
            HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_mass = tl.sum(tl.exp2(b_s - b_normaliser[:, None]), 0)
        b_mass = tl.sum(tl.reshape(b_mass, [per_tile, PADDED_WIDTH]), 1)
        tl.store(p_out + start + o_piece, b_mass)
    for start in range(unmasked_pieces, visible, per_tile):
        o_column_piece = start + o_tile // PADDED_WIDTH
        o_from_span = o_column_piece % PIECES * width + o_tile % PADDED_WIDTH
        o_key = lead + o_column_piece // PIECES * span + o_from_span
        m_key = (o_column_piece < visible) & (o_tile % PADDED_WIDTH < width) & (o_from_span < span)
        b_s = _tile_logits(
            b_q, p_k, o_key, m_key, stride_kl, stride_kd, scale, softcap,
            HEAD_DIM, PADDED_DIM, True, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_s = tl.where(m_key[None, :] & (o_key[None, :] < o_end[:, None]), b_s, -float("inf"))
        b_mass = tl.sum(tl.exp2(b_s - b_normaliser[:, None]), 0)
        b_mass = tl.sum(tl.reshape(b_mass, [per_tile, PADDED_WIDTH]), 1)
        o_out = start + o_piece
        tl.store(p_out + o_out, tl.where(o_out < visible, b_mass, 0.0), mask=o_out < all_pieces)
    # Pieces that no query of the span sees
    for start in range(visible, all_pieces, TILE):
        o_out = start + o_tile
        tl.store(p_out + o_out, tl.zeros([TILE], tl.float32), mask=o_out < all_pieces)
