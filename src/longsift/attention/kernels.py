"""The kernels of `longsift.attention.triton`.

A program measures a block of queries of one head and walks once over the keys. No pass looks for the largest logit of a
row first and none is carried along: exponentials are taken relative to a logit of the row itself, the largest among
its first keys and those nearest to it. All but extreme attention stays within float32 that way; a program whose sums
leave its range looks for the true largest and walks again. So a pair costs one product, one subtraction fused with the
scale, one exponential and one or two additions, and the products of one block run while another is exponentiated.

Products take the inputs as they are (bfloat16 and float16 on tensor cores, float32 in full) and are accumulated
in float32. Logits carry a factor log2(e), so that exponentials are powers of 2. Each program alone writes its part
of the result, in one order: the bits depend neither on the run nor on what else is in the batch.

Names: `b_` a block of values, `o_` offsets, `m_` a mask, `p_` a pointer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_logits(
    b_q,  # [ROWS, PADDED_DIM]
    p_tile,  # the first key of the tile
    o_in_tile,  # [TILE]
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
    p_k = p_tile + (o_in_tile[None, :] * stride_kl + o_d[:, None] * stride_kd)  # [PADDED_DIM, TILE]
    if MASKED:
        b_k = tl.load(p_k, mask=m_key[None, :] & (o_d < HEAD_DIM)[:, None], other=0.0)
    elif HEAD_DIM == PADDED_DIM:
        b_k = tl.load(p_k)
    else:
        b_k = tl.load(p_k, mask=(o_d < HEAD_DIM)[:, None], other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both infinities too
        b_s = softcap * (1.0 - 2.0 / (tl.exp2(b_s * 2.885390081777927) + 1.0))
    return b_s


@triton.jit
def _seen_logits(
    b_q,
    p_k,
    start,  # the tile's first key
    o_in_tile,
    b_end,  # [ROWS]: a row sees the keys before
    end,  # the keys before are there
    stride_kl,
    stride_kd,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    b_unseen=None,  # [ROWS]: in a sliding layer, the last key that a row does not see any more
):
    """Logits · log2(e) of a tile of keys, [ROWS, TILE], -inf where a row does not see the key."""
    o_key = start + o_in_tile
    b_s = _tile_logits(
        b_q, p_k + start * tl.cast(stride_kl, tl.int64), o_in_tile, o_key < end, stride_kl, stride_kd, scale, softcap,
        HEAD_DIM, PADDED_DIM, True, SOFTCAP, PRECISION,
    )  # fmt: skip
    m_seen = o_key[None, :] < b_end[:, None]
    if b_unseen is not None:
        m_seen = m_seen & (o_key[None, :] > b_unseen[:, None])
    return tl.where(m_seen, b_s, -float("inf"))


@triton.jit
def _tile_values(
    p_tile,
    o_in_tile,
    m_key,
    stride_vl,
    stride_vd,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of values, [TILE, PADDED_VALUE]; without MASKED, every key is there."""
    o_v = tl.arange(0, PADDED_VALUE)
    p_v = p_tile + (o_in_tile[:, None] * stride_vl + o_v[None, :] * stride_vd)
    if MASKED:
        b_v = tl.load(p_v, mask=m_key[:, None] & (o_v < VALUE_DIM)[None, :], other=0.0)
    elif VALUE_DIM == PADDED_VALUE:
        b_v = tl.load(p_v)
    else:
        b_v = tl.load(p_v, mask=(o_v < VALUE_DIM)[None, :], other=0.0)
    return b_v


@triton.jit
def _partial_sums(b_x, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Sums of a tile over every eighth column, [ROWS, 8]: what one thread holds of a row, added without its peers."""
    return tl.sum(tl.reshape(b_x, [ROWS, TILE // 8, 8]), 1)


# Sums of exponentials up to here leave room for those of their squares, and for as many more.
LARGEST_SUM = tl.constexpr(2.0**60)


@triton.jit
def far_kernel(
    p_q,
    p_k,
    p_rows,  # None when EVERY query is measured
    p_mass,
    p_squares,
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
    count,
    length,
    distance,
    skip,
    window,  # None unless SLIDING: how many keys a query sees, its own included
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,  # keys of a tile where masks take registers
    EVERY: tl.constexpr,
    SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    i_head_of_batch = program % batch_heads
    # The blocks that see most keys first, so that the last to end is a short one
    first_row = (tl.num_programs(0) // batch_heads - 1 - program // batch_heads) * ROWS
    i_batch = (i_head_of_batch // heads).to(tl.int64)
    i_head = i_head_of_batch % heads
    o_row = first_row + tl.arange(0, ROWS)
    m_row = o_row < count
    last_row = tl.minimum(first_row + ROWS, count) - 1
    o_row = tl.minimum(o_row, last_row)  # rows that are not there repeat the last
    if EVERY:
        first = first_row
        last = last_row
        b_position = o_row
    else:
        first = tl.load(p_rows + first_row).to(tl.int32)
        last = tl.load(p_rows + last_row).to(tl.int32)
        b_position = tl.load(p_rows + o_row).to(tl.int32)
    o_end = b_position + 1  # a row sees the keys before
    o_d = tl.arange(0, PADDED_DIM)
    p_q += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + first_row.to(tl.int64) * stride_ql
    p_k += i_batch * stride_kb + (i_head // group).to(tl.int64) * stride_kh
    far_stride_kl = tl.cast(stride_kl, tl.int64)
    b_q = tl.load(
        p_q + ((o_row - first_row)[:, None] * stride_ql + o_d[None, :] * stride_qd),
        mask=(o_d < HEAD_DIM)[None, :],
        other=0.0,
    )
    o_in_tile = tl.arange(0, TILE)
    o_in_edge = tl.arange(0, EDGE)

    # In whole tiles: the keys from k_start to k_sink may be ones to skip or ones that not all rows still see; those up
    # to k_far are far from every row; those from k_near on are far from none; those up to k_seen are seen by every row.
    k_end = last + 1
    k_sink = tl.minimum(tl.cdiv(skip, TILE), tl.cdiv(k_end, TILE)) * TILE
    k_start = 0
    b_unseen = None
    if SLIDING:
        b_unseen = b_position - window
        k_start = tl.maximum(first - window + 1, 0) // TILE * TILE
        k_sink = tl.maximum(k_sink, tl.cdiv(tl.maximum(last - window + 1, 0), TILE) * TILE)
    k_far = tl.maximum(tl.maximum(first - distance + 1, 0) // TILE * TILE, k_sink)
    k_near = tl.maximum(tl.cdiv(tl.maximum(last - distance + 1, 0), TILE) * TILE, k_far)
    k_seen = tl.maximum((first + 1) // TILE * TILE, k_near)

    b_reference = tl.full([ROWS], -float("inf"), tl.float32)
    for nearest in tl.static_range(2):
        k_first = first // EDGE * EDGE if nearest else k_start
        b_s_edge = _seen_logits(
            b_q, p_k, k_first, o_in_edge, o_end, length, stride_kl, stride_kd,
            scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION, b_unseen,
        )  # fmt: skip
        b_reference = tl.maximum(b_reference, tl.max(b_s_edge, 1))
    if SLIDING:  # rows that do not see the first row's key see their own
        for start in range(first // EDGE * EDGE, tl.where(last - first < window, 0, k_end), EDGE):
            b_s_edge = _seen_logits(
                b_q, p_k, start, o_in_edge, o_end, length, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION, b_unseen,
            )  # fmt: skip
            b_reference = tl.maximum(b_reference, tl.max(b_s_edge, 1))

    b_mass = tl.zeros([ROWS], tl.float32)
    b_squares = tl.zeros([ROWS], tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    attempt = 0
    while attempt < 2:
        b_far_parts = tl.zeros([ROWS, 8], tl.float32)
        b_square_parts = tl.zeros([ROWS, 8], tl.float32)
        b_edge_parts = tl.zeros([ROWS, 8], tl.float32)  # the far keys of tiles that hold others too
        b_rest_parts = tl.zeros([ROWS, 8], tl.float32)  # all keys of tiles that hold others
        for start in range(k_sink, k_far, TILE):
            b_s = _tile_logits(
                b_q, p_k + start * far_stride_kl, o_in_tile, o_in_tile < TILE, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_e = tl.exp2(b_s - b_reference[:, None])
            b_far_parts += _partial_sums(b_e, ROWS, TILE)
            b_square_parts += _partial_sums(b_e * b_e, ROWS, TILE)
        for start in range(k_near, k_seen, TILE):
            b_s = _tile_logits(
                b_q, p_k + start * far_stride_kl, o_in_tile, o_in_tile < TILE, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_rest_parts += _partial_sums(tl.exp2(b_s - b_reference[:, None]), ROWS, TILE)
        # What lies between: the keys at the boundaries of the skipped, the far and the future ones
        for i in range(k_start, k_sink + (k_near - k_far) + (k_end - k_seen), EDGE):
            start = i + tl.where(i >= k_sink, k_far - k_sink, 0)
            start += tl.where(i >= k_sink + (k_near - k_far), k_seen - k_near, 0)
            o_key = start + o_in_edge
            b_s_edge = _seen_logits(
                b_q, p_k, start, o_in_edge, o_end, length, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION, b_unseen,
            )  # fmt: skip
            b_e_edge = tl.exp2(b_s_edge - b_reference[:, None])
            b_rest_parts += _partial_sums(b_e_edge, ROWS, EDGE)
            m_far = (o_key[None, :] <= (b_position - distance)[:, None]) & (o_key >= skip)[None, :]
            b_e_edge = tl.where(m_far, b_e_edge, 0.0)
            b_edge_parts += _partial_sums(b_e_edge, ROWS, EDGE)
            b_square_parts += _partial_sums(b_e_edge * b_e_edge, ROWS, EDGE)
        b_squares = tl.sum(b_square_parts, 1)
        b_total = tl.sum(b_far_parts + b_rest_parts, 1)
        b_mass = tl.sum(b_far_parts + b_edge_parts, 1)
        attempt += 2
        if (tl.max(b_total, 0) > LARGEST_SUM) & (attempt == 2):
            attempt = 1
            for start in range(k_start, k_end, EDGE):
                b_s_edge = _seen_logits(
                    b_q, p_k, start, o_in_edge, o_end, length, stride_kl, stride_kd,
                    scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION, b_unseen,
                )  # fmt: skip
                b_reference = tl.maximum(b_reference, tl.max(b_s_edge, 1))
    o_out = i_head_of_batch.to(tl.int64) * count + o_row
    tl.store(p_mass + o_out, b_mass / b_total, mask=m_row)
    tl.store(p_squares + o_out, b_squares / (b_total * b_total), mask=m_row)


@triton.jit
def span_focus_kernel(
    p_q,
    p_k,
    p_work,  # None when the query spans are a PROGRESSION
    p_out,
    p_scratch,  # [programs, key pieces, ROWS]: the mass of each row on each piece of a key span, not yet normalised
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
    first_work,
    first_span,
    step,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,
    PIECES: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    PROGRESSION: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    piece = program // batch_heads % PIECES
    i_work = first_work + program // batch_heads // PIECES
    i_batch = program % batch_heads // heads
    i_head = program % heads
    if PROGRESSION:
        slot = tl.where(step > 0, n_query_spans - 1 - i_work, i_work)
        query_span = first_span + slot * step
    else:
        slot = tl.load(p_work + i_work)
        query_span = tl.load(p_work + n_query_spans + i_work)
    n_spans = length // span
    lead = length % span
    span_start = lead + query_span * span

    first_row = span_start + piece * width
    last_row = tl.minimum(first_row + width, span_start + span) - 1
    o_row = first_row + tl.arange(0, ROWS)
    m_row = o_row <= last_row
    o_row = tl.minimum(o_row, last_row)  # rows that are not there repeat the last
    o_d = tl.arange(0, PADDED_DIM)
    p_q += i_batch.to(tl.int64) * stride_qb + i_head.to(tl.int64) * stride_qh + first_row.to(tl.int64) * stride_ql
    p_k += i_batch.to(tl.int64) * stride_kb + (i_head // group).to(tl.int64) * stride_kh
    far_stride_kl = tl.cast(stride_kl, tl.int64)
    b_q = tl.load(
        p_q + ((o_row - first_row)[:, None] * stride_ql + o_d[None, :] * stride_qd),
        mask=(o_d < HEAD_DIM)[None, :],
        other=0.0,
    )

    # A row sees the keys [0, o_end). A tile of spans holds TILE / PADDED_WIDTH pieces side by side.
    per_tile: tl.constexpr = TILE // PADDED_WIDTH
    o_in_tile = tl.arange(0, TILE)
    o_in_edge = tl.arange(0, EDGE)
    o_piece = tl.arange(0, per_tile)
    o_scratch = tl.arange(0, ROWS)
    all_pieces = n_spans * PIECES
    before = query_span * PIECES
    if CAUSAL:
        o_end = o_row + 1
        visible = before + PIECES
        nearest = first_row
    else:
        o_end = tl.zeros([ROWS], tl.int32) + span_start
        visible = before
        nearest = tl.maximum(span_start - EDGE, 0)
    p_scratch += program.to(tl.int64) * all_pieces * ROWS

    b_reference = tl.full([ROWS], -float("inf"), tl.float32)
    for near in tl.static_range(2):
        b_s_edge = _seen_logits(
            b_q, p_k, near * nearest, o_in_edge, o_end, length, stride_kl, stride_kd,
            scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_reference = tl.maximum(b_reference, tl.max(b_s_edge, 1))

    unmasked_pieces = before // per_tile * per_tile if EVEN else 0
    b_total = tl.zeros([ROWS], tl.float32)
    attempt = 0
    while attempt < 2:
        b_total = tl.zeros([ROWS], tl.float32)
        for start in range(0, tl.minimum(lead, span_start), EDGE):  # the keys before the first span
            b_s_edge = _seen_logits(
                b_q, p_k, start, o_in_edge, tl.full([ROWS], 0, tl.int32) + lead, lead, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_total += tl.sum(tl.exp2(b_s_edge - b_reference[:, None]), 1)
        for start in range(0, unmasked_pieces, per_tile):
            first_key = lead + start * PADDED_WIDTH
            b_s = _tile_logits(
                b_q, p_k + first_key * far_stride_kl, o_in_tile, o_in_tile < TILE, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_e = tl.exp2(b_s - b_reference[:, None])
            b_mass = tl.sum(tl.reshape(b_e, [ROWS, per_tile, PADDED_WIDTH]), 2)
            tl.store(p_scratch + start * ROWS + (o_piece[None, :] * ROWS + o_scratch[:, None]), b_mass)
            b_total += tl.sum(b_mass, 1)
        for start in range(unmasked_pieces, visible, per_tile):
            o_column = start + o_in_tile // PADDED_WIDTH
            o_from_span = o_column % PIECES * width + o_in_tile % PADDED_WIDTH
            first_key = lead + start // PIECES * span
            o_from_first = (o_column // PIECES - start // PIECES) * span + o_from_span
            o_key = first_key + o_from_first
            m_key = (o_column < visible) & (o_in_tile % PADDED_WIDTH < width) & (o_from_span < span)
            b_s = _tile_logits(
                b_q, p_k + first_key * far_stride_kl, o_from_first, m_key, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, True, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_s = tl.where(m_key[None, :] & (o_key[None, :] < o_end[:, None]), b_s, -float("inf"))
            b_e = tl.exp2(b_s - b_reference[:, None])
            b_mass = tl.sum(tl.reshape(b_e, [ROWS, per_tile, PADDED_WIDTH]), 2)
            tl.store(
                p_scratch + start * ROWS + (o_piece[None, :] * ROWS + o_scratch[:, None]),
                b_mass,
                mask=(start + o_piece < visible)[None, :],
            )
            b_total += tl.sum(b_mass, 1)
        attempt += 2
        if (tl.max(b_total, 0) > LARGEST_SUM) & (attempt == 2):
            attempt = 1
            for start in range(0, last_row + 1, EDGE):
                b_s_edge = _seen_logits(
                    b_q, p_k, start, o_in_edge, o_end, length, stride_kl, stride_kd,
                    scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
                )  # fmt: skip
                b_reference = tl.maximum(b_reference, tl.max(b_s_edge, 1))

    # Only now is the normaliser of a row known. The rows were written by other threads than those that read them.
    tl.debug_barrier()
    b_weight = tl.where(m_row, 1.0 / b_total, 0.0)
    row = ((i_batch * heads + i_head).to(tl.int64) * n_query_spans + slot) * PIECES + piece
    p_out += row * all_pieces
    chunk: tl.constexpr = 16
    o_chunk = tl.arange(0, chunk)
    for start in range(0, visible, chunk):
        o_column = start + o_chunk
        b_mass = tl.load(
            p_scratch + start * ROWS + (o_chunk[:, None] * ROWS + o_scratch[None, :]),
            mask=(o_column < visible)[:, None],
            other=0.0,
        )
        tl.store(p_out + o_column, tl.sum(b_mass * b_weight[None, :], 1), mask=o_column < visible)
    # Pieces that no query of the span sees
    for start in range(visible, all_pieces, TILE):
        o_out = start + o_in_tile
        tl.store(p_out + o_out, tl.zeros([TILE], tl.float32), mask=o_out < all_pieces)


@triton.jit
def attend_and_focus_kernel(
    p_q,
    p_k,
    p_v,
    p_attention,
    p_focus,
    p_scratch,  # [programs, spans, SPAN]: the mass of each row on each key span, not yet normalised
    stride_qb,
    stride_qh,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    stride_ab,
    stride_ah,
    stride_al,
    heads,
    group,
    batch_heads,
    length,
    first_work,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    n_spans = length // SPAN
    lead = length % SPAN
    query_span = n_spans - 1 - first_work - program // batch_heads
    i_batch = (program % batch_heads // heads).to(tl.int64)
    i_head = program % heads
    first_row = lead + query_span * SPAN
    o_in_span = tl.arange(0, SPAN)
    o_d = tl.arange(0, PADDED_DIM)
    o_v = tl.arange(0, PADDED_VALUE)
    o_tile = tl.arange(0, TILE)
    p_q += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + first_row.to(tl.int64) * stride_ql
    p_k += i_batch * stride_kb + (i_head // group).to(tl.int64) * stride_kh
    p_v += i_batch * stride_vb + (i_head // group).to(tl.int64) * stride_vh
    far_stride_kl = tl.cast(stride_kl, tl.int64)
    far_stride_vl = tl.cast(stride_vl, tl.int64)
    p_scratch += program.to(tl.int64) * n_spans * SPAN
    b_q = tl.load(
        p_q + (o_in_span[:, None] * stride_ql + o_d[None, :] * stride_qd), mask=(o_d < HEAD_DIM)[None, :], other=0.0
    )

    # 1. The keys before the query span, relative to a logit of theirs
    o_before = tl.full([SPAN], 0, tl.int32) + first_row
    b_reference = tl.full([SPAN], -float("inf"), tl.float32)
    for near in tl.static_range(2):
        b_s = _seen_logits(
            b_q, p_k, near * tl.maximum(first_row - TILE, 0), o_tile, o_before, length, stride_kl, stride_kd,
            scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_reference = tl.maximum(b_reference, tl.max(b_s, 1))
    # Exponentials are multiplied with the values in the type of these.
    largest: tl.constexpr = 2.0**15 if p_v.dtype.element_ty == tl.float16 else LARGEST_SUM
    b_out = tl.zeros([SPAN, PADDED_VALUE], tl.float32)
    b_prior = tl.zeros([SPAN], tl.float32)
    attempt = 0
    while attempt < 2:
        b_out = tl.zeros([SPAN, PADDED_VALUE], tl.float32)
        b_prior = tl.zeros([SPAN], tl.float32)
        for start in range(0, tl.minimum(lead, first_row), TILE):
            b_s = _seen_logits(
                b_q, p_k, start, o_tile, tl.full([SPAN], 0, tl.int32) + lead, lead, stride_kl, stride_kd,
                scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
            )  # fmt: skip
            b_e = tl.exp2(b_s - b_reference[:, None])
            b_prior += tl.sum(b_e, 1)
            b_v = _tile_values(
                p_v + start * far_stride_vl, o_tile, start + o_tile < lead, stride_vl, stride_vd,
                VALUE_DIM, PADDED_VALUE, True,
            )  # fmt: skip
            b_out = tl.dot(b_e.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        for key_span in range(query_span):
            b_mass = tl.zeros([SPAN], tl.float32)
            for part in tl.static_range(SPAN // TILE):
                start = lead + key_span * SPAN + part * TILE
                b_s = _tile_logits(
                    b_q, p_k + start * far_stride_kl, o_tile, o_tile < TILE, stride_kl, stride_kd, scale, softcap,
                    HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
                )  # fmt: skip
                b_e = tl.exp2(b_s - b_reference[:, None])
                b_mass += tl.sum(b_e, 1)
                b_v = _tile_values(
                    p_v + start * far_stride_vl, o_tile, o_tile < TILE, stride_vl, stride_vd,
                    VALUE_DIM, PADDED_VALUE, False,
                )  # fmt: skip
                b_out = tl.dot(b_e.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
            tl.store(p_scratch + key_span * SPAN + o_in_span, b_mass)
            b_prior += b_mass
        attempt += 2
        if (tl.max(b_prior, 0) > largest) & (attempt == 2):
            attempt = 1
            for start in range(0, first_row, TILE):
                b_s = _seen_logits(
                    b_q, p_k, start, o_tile, o_before, length, stride_kl, stride_kd,
                    scale, softcap, HEAD_DIM, PADDED_DIM, SOFTCAP, PRECISION,
                )  # fmt: skip
                b_reference = tl.maximum(b_reference, tl.max(b_s, 1))

    # 2. The query span itself, relative to the largest logit so far
    b_largest = b_reference
    b_own = tl.zeros([SPAN], tl.float32)
    for part in range(SPAN // TILE):
        start = first_row + part * TILE
        b_s = _tile_logits(
            b_q, p_k + start * far_stride_kl, o_tile, o_tile < TILE, stride_kl, stride_kd, scale, softcap,
            HEAD_DIM, PADDED_DIM, False, SOFTCAP, PRECISION,
        )  # fmt: skip
        b_s = tl.where((part * TILE + o_tile)[None, :] <= o_in_span[:, None], b_s, -float("inf"))
        b_new = tl.maximum(b_largest, tl.max(b_s, 1))
        b_shrink = tl.exp2(b_largest - b_new)
        b_e = tl.exp2(b_s - b_new[:, None])
        b_own = b_own * b_shrink + tl.sum(b_e, 1)
        b_v = _tile_values(
            p_v + start * far_stride_vl, o_tile, o_tile < TILE, stride_vl, stride_vd, VALUE_DIM, PADDED_VALUE, False
        )
        b_out = tl.dot(b_e.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)
        b_largest = b_new
    b_shrink = tl.exp2(b_reference - b_largest)
    b_total = b_prior * b_shrink + b_own
    p_attention += i_batch * stride_ab + i_head.to(tl.int64) * stride_ah + first_row.to(tl.int64) * stride_al
    tl.store(
        p_attention + (o_in_span[:, None] * stride_al + o_v[None, :]),
        (b_out / b_total[:, None]).to(p_attention.dtype.element_ty),
        mask=(o_v < VALUE_DIM)[None, :],
    )

    # Only now is the normaliser of a row known. The rows were written by other threads than those that read them.
    tl.debug_barrier()
    b_weight = b_shrink / b_total if CAUSAL else 1.0 / b_prior
    p_focus += ((program % batch_heads).to(tl.int64) * n_spans + query_span) * n_spans
    chunk: tl.constexpr = 16
    o_chunk = tl.arange(0, chunk)
    for start in range(0, query_span, chunk):
        o_column = start + o_chunk
        b_mass = tl.load(
            p_scratch + start * SPAN + (o_chunk[:, None] * SPAN + o_in_span[None, :]),
            mask=(o_column < query_span)[:, None],
            other=0.0,
        )
        tl.store(p_focus + o_column, tl.sum(b_mass * b_weight[None, :], 1), mask=o_column < query_span)
    if CAUSAL:
        tl.store(p_focus + query_span, tl.sum(b_own / b_total, 0))
    # Spans that no query of this one sees
    for start in range(query_span + 1 if CAUSAL else query_span, n_spans, TILE):
        tl.store(p_focus + start + o_tile, tl.zeros([TILE], tl.float32), mask=start + o_tile < n_spans)
