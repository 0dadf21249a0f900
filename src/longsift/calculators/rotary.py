"""Queries and keys out of a table of the vocabulary, turned to their positions, in one Triton kernel.

A table holds what the first layer makes of every token before RoPE. One program writes one head of a block of
tokens: it reads their rows, turns each pair of numbers by the angle of the position, in float32, and rounds once.
Neighbouring programs write other heads of the same tokens, so that a token's row is read as a whole.

Names: `b_` a block of values, `o_` offsets, `m_` a mask, `p_` a pointer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longsift.calculators.positions import Turns

TOKENS = 32  # tokens of a program: a few kilobytes of a head, in long writes


def look_up(table: Tensor, input_ids: Tensor, turns: Turns | None, rows: Tensor | None = None) -> Tensor:
    """The heads of tokens at their positions.

    Args:
        table: (vocabulary, heads, head_dim), the last dimension contiguous.
        input_ids: (batch, length) int64 on the table's device. An id outside the vocabulary gives NaN.
        turns: of `length` positions; None where the layer has no positions.
        rows: ascending positions to write, (rows,) int64, when not all are wanted; one outside the window gives NaN.

    Returns:
        (batch, heads, length or len(rows), head_dim), contiguous, in the table's type.
    """
    vocabulary, heads, head_dim = table.shape
    batch, length = input_ids.shape
    count = length if rows is None else len(rows)
    pairs = 0 if turns is None else turns.cos.shape[1]
    out = torch.empty(batch, heads, count, head_dim, dtype=table.dtype, device=table.device)
    blocks = triton.cdiv(count, TOKENS)
    with torch.cuda.device_of(table):
        _look_up_kernel[(batch * blocks * heads,)](
            table,
            input_ids,
            rows,
            None if turns is None else turns.cos,
            None if turns is None else turns.sin,
            out,
            table.stride(0),
            table.stride(1),
            input_ids.stride(0),
            length,
            count,
            blocks,
            vocabulary,
            heads,
            HEAD_DIM=head_dim,
            PAIRS=pairs,
            PADDED_PAIRS=triton.next_power_of_2(max(pairs, 1)),
            PADDED_REST=triton.next_power_of_2(max(head_dim - 2 * pairs, 1)),
            TOKENS=TOKENS,
            SOME=rows is not None,
        )
    return out


@triton.jit
def _look_up_kernel(
    p_table,
    p_ids,
    p_rows,  # None when every position is written
    p_cos,
    p_sin,
    p_out,
    stride_token,
    stride_head,
    stride_window,
    length,
    count,
    blocks,
    vocabulary,
    heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    SOME: tl.constexpr,
):
    program = tl.program_id(0)
    i_head = program % heads
    i_block = program // heads % blocks
    i_batch = (program // heads // blocks).to(tl.int64)
    o_row = i_block * TOKENS + tl.arange(0, TOKENS)
    m_row = o_row < count
    o_position = o_row.to(tl.int64)
    if SOME:
        o_position = tl.load(p_rows + o_row, mask=m_row, other=0)
    m_position = m_row & (o_position >= 0) & (o_position < length)
    b_id = tl.load(p_ids + i_batch * stride_window + o_position, mask=m_position, other=-1)
    m_id = (b_id >= 0) & (b_id < vocabulary)
    p_from = p_table + b_id[:, None] * stride_token + i_head.to(tl.int64) * stride_head
    p_to = p_out + ((i_batch * heads + i_head) * count + o_row.to(tl.int64)[:, None]) * HEAD_DIM

    if PAIRS > 0:
        o_pair = tl.arange(0, PADDED_PAIRS)[None, :]
        m_pair = o_pair < PAIRS
        b_first = tl.load(p_from + o_pair, mask=m_id[:, None] & m_pair, other=float("nan")).to(tl.float32)
        b_second = tl.load(p_from + PAIRS + o_pair, mask=m_id[:, None] & m_pair, other=float("nan")).to(tl.float32)
        o_angle = o_position[:, None] * PAIRS + o_pair
        b_cos = tl.load(p_cos + o_angle, mask=m_position[:, None] & m_pair, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_angle, mask=m_position[:, None] & m_pair, other=0.0).to(tl.float32)
        tl.store(p_to + o_pair, b_first * b_cos - b_second * b_sin, mask=m_row[:, None] & m_pair)
        tl.store(p_to + PAIRS + o_pair, b_second * b_cos + b_first * b_sin, mask=m_row[:, None] & m_pair)
    if HEAD_DIM > 2 * PAIRS:
        o_rest = 2 * PAIRS + tl.arange(0, PADDED_REST)[None, :]
        m_rest = o_rest < HEAD_DIM
        b_rest = tl.load(p_from + o_rest, mask=m_id[:, None] & m_rest, other=float("nan"))
        tl.store(p_to + o_rest, b_rest, mask=m_row[:, None] & m_rest)
