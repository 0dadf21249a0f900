"""Triton kernels for what a network does between its matrix products: one pass over memory each.

All compute in float32 and round once, and every number of the result depends on its own row alone, in one order.

Names: `b_` a block of values, `o_` offsets, `m_` a mask, `p_` a pointer.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Gate = Literal["silu", "gelu_tanh"]

BLOCK = 4096  # numbers of a program of 4 warps: long loads, several to a thread
TOKENS = 32  # of a program of `rotate`
LARGEST_ROW = 1 << 15  # numbers of a row that a program holds in its registers


def is_dense(x: Tensor) -> bool:
    """Whether the rows of x are contiguous and lie side by side in memory, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return x.stride(-1) == 1


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / √(mean x² + eps) · (weight + offset)`, row by row.

    Args:
        x: (..., n), its rows dense in memory in any order of the other dimensions.
        weight: (n,)
        eps: added to the mean square.
        offset: added to the weight.

    Returns:
        In the shape, type and order in memory of x.

    Raises:
        ValueError: rows with gaps between them, or too long to be held at once.
    """
    n = x.shape[-1]
    if not is_dense(x):
        raise ValueError(f"the rows must be dense in memory; got strides {x.stride()} of the shape {tuple(x.shape)}")
    if n > LARGEST_ROW:
        raise ValueError(f"a row has at most {LARGEST_ROW} numbers; got {n}")
    out = torch.empty_like(x)  # in the order of x
    padded = triton.next_power_of_2(n)
    rows = max(BLOCK // padded, 1)
    if x.numel():
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(x.numel() // n, rows),)](
                x,
                weight,
                out,
                x.numel() // n,
                eps,
                offset,
                N=n,
                PADDED=padded,
                ROWS=rows,
                num_warps=max(4, min(padded // 1024, 16)),
            )
    return out


def gate_(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    """`act(gate) · up`, written over `gate`.

    Args:
        gate: contiguous.
        up: likewise, of its shape.
        kind: the activation: x·sigmoid(x), or GELU by its tanh formula.

    Raises:
        ValueError: shapes that differ, or that are not contiguous.
    """
    if gate.shape != up.shape or not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError(f"gate and up must be contiguous and of one shape; got {gate.shape} and {up.shape}")
    if gate.numel():
        with torch.cuda.device_of(gate):
            _gate_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, gate.numel(), GELU=kind == "gelu_tanh", BLOCK=BLOCK
            )
    return gate


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these: shapes as it states them, one type, and a last dimension that is contiguous."""
    if (q.ndim, k.ndim, cos.ndim) != (4, 4, 3) or sin.shape != cos.shape or sin.stride() != cos.stride():
        return False
    batch, _, length, head_dim = q.shape
    return (
        (k.shape[0], *k.shape[2:]) == (batch, length, head_dim)
        and cos.shape[0] in (1, batch)
        and tuple(cos.shape[1:]) == (length, head_dim)
        and head_dim % 2 == 0
        and all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, cos, sin))
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions: `x · cos + (-second half of x, first half of x) · sin`.

    Args:
        q: (batch, heads, length, head_dim), the last dimension contiguous.
        k: (batch, kv_heads, length, head_dim), likewise.
        cos: (batch or 1, length, head_dim), likewise.
        sin: of the shape and strides of cos.

    Returns:
        New tensors in the shapes, types and orders in memory of q and k.

    Raises:
        ValueError: see `can_rotate`.
    """
    if not can_rotate(q, k, cos, sin):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, cos, sin))
        raise ValueError(f"q, k, cos and sin do not fit together: {shapes}")
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    blocks = triton.cdiv(length, TOKENS)
    if q.numel():
        with torch.cuda.device_of(q):
            _rotate_kernel[(batch * blocks * (heads + kv_heads),)](
                q,
                k,
                cos,
                sin,
                out_q,
                out_k,
                *q.stride()[:3],
                *k.stride()[:3],
                *out_q.stride()[:3],
                *out_k.stride()[:3],
                *cos.stride()[:2],
                length,
                blocks,
                heads,
                heads + kv_heads,
                HALF=head_dim // 2,
                PADDED=triton.next_power_of_2(head_dim // 2),
                TOKENS=TOKENS,
            )
    return out_q, out_k


@triton.jit
def _rms_norm_kernel(
    p_x,
    p_weight,
    p_out,
    rows,
    eps,
    offset,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, PADDED)
    m_column = o_column < N
    o_x = o_row[:, None] * N + o_column[None, :]  # [ROWS, PADDED]
    m_x = (o_row < rows)[:, None] & m_column[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_factor = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32) + offset
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) / N + eps)
    tl.store(p_out + o_x, b_x * b_scale[:, None] * b_factor[None, :], mask=m_x)


@triton.jit
def _gate_kernel(p_gate, p_up, numbers, GELU: tl.constexpr, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < numbers
    b_gate = tl.load(p_gate + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_x, mask=m_x, other=0.0).to(tl.float32)
    # silu(x) = x / (1 + exp(-x)); GELU is x·(1 + tanh u)/2 = x / (1 + exp(-2u)) with u = √(2/π) · (x + 0.044715 x³)
    b_exponent = -1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate) if GELU else -b_gate
    tl.store(p_gate + o_x, b_gate / (1.0 + tl.exp(b_exponent)) * b_up, mask=m_x)


@triton.jit
def _rotate_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_out_q,
    p_out_k,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_out_qb,
    stride_out_qh,
    stride_out_ql,
    stride_out_kb,
    stride_out_kh,
    stride_out_kl,
    stride_cb,
    stride_cl,
    length,
    blocks,
    heads,
    all_heads,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Neighbouring programs turn other heads of the same tokens, which share cos and sin.
    program = tl.program_id(0)
    i_head = (program % all_heads).to(tl.int64)
    i_batch = (program // all_heads // blocks).to(tl.int64)
    o_token = (program // all_heads % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o_pair = tl.arange(0, PADDED)[None, :]
    m_x = (o_token < length)[:, None] & (o_pair < HALF)
    if i_head < heads:
        p_x = p_q + i_batch * stride_qb + i_head * stride_qh + o_token[:, None] * stride_ql + o_pair
        p_out = p_out_q + i_batch * stride_out_qb + i_head * stride_out_qh + o_token[:, None] * stride_out_ql + o_pair
    else:
        i_head -= heads
        p_x = p_k + i_batch * stride_kb + i_head * stride_kh + o_token[:, None] * stride_kl + o_pair
        p_out = p_out_k + i_batch * stride_out_kb + i_head * stride_out_kh + o_token[:, None] * stride_out_kl + o_pair
    o_angle = i_batch * stride_cb + o_token[:, None] * stride_cl + o_pair
    b_first = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + HALF, mask=m_x, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_angle, mask=m_x, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_angle, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_out, b_first * b_cos - b_second * b_sin, mask=m_x)
    b_cos = tl.load(p_cos + o_angle + HALF, mask=m_x, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_angle + HALF, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_out + HALF, b_second * b_cos + b_first * b_sin, mask=m_x)
