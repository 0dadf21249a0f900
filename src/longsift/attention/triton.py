"""Triton kernels, for GPUs: exact, in one pass over the keys, in memory linear in the length.

The bits depend neither on the run nor on what else is in the batch. See `longsift.attention.kernels`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longsift.attention.kernels import attend_and_focus_kernel, far_kernel, span_focus_kernel

LARGEST_HEAD_DIM = 256
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_PRODUCT = 16  # the least side of a tile that tensor cores take
FUSED_SPAN = 128  # the span of LADM, and of a calibration
SCRATCH_BYTES = 1 << 29  # of the masses by row of a launch,
SMALLEST_TILE = 32
SHARED_BYTES = 2 << 10  # of sums between threads
FUSED_BYTES, FUSED_BYTES_WIDE = 97 << 10, 162 << 10  # shared memory that a program of `attend_and_focus` takes
LEAST_PROGRAMS = 512  # but not for fewer than these


def refusal(q: Tensor) -> str | None:
    """Why these queries cannot be measured here; None when they can."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on a GPU; got {q.device}"
    if q.dtype not in SUPPORTED_DTYPES:
        return f"takes float16, bfloat16 and float32; got {q.dtype}"
    nvidia = q.is_cuda and torch.version.cuda is not None
    if nvidia and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "takes bfloat16 from compute capability 8.0 on; --dtype float16 works before"
    if q.shape[3] > LARGEST_HEAD_DIM:
        return f"takes head_dim up to {LARGEST_HEAD_DIM}; got {q.shape[3]}"
    return None


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
    batch, heads, count, head_dim = q.shape
    q, k = _addressable(q), _addressable(k)
    shape = _far_shape(q)
    sums = torch.empty(2, batch, heads, count, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        far_kernel[(triton.cdiv(count, shape.rows) * batch * heads,)](
            q,
            k,
            rows,
            sums[0],
            sums[1],
            *q.stride(),
            *k.stride(),
            heads,
            heads // k.shape[1],
            batch * heads,
            count,
            k.shape[2],
            min(distance, k.shape[2]),
            min(skip, k.shape[2]),
            sliding_window,
            *_factors(scale, softcap),
            HEAD_DIM=head_dim,
            PADDED_DIM=_padded(head_dim),
            ROWS=shape.rows,
            TILE=shape.tile,
            EDGE=shape.tile // 2,
            EVERY=rows is None,
            SLIDING=sliding_window is not None,
            SOFTCAP=softcap is not None,
            PRECISION=_precision(q),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **_register_limit(shape),
        )
    return sums[0], sums[1]


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
    q, k = _addressable(q), _addressable(k)
    n_spans = length // span
    shape = _focus_shape(q)
    pieces = -(-span // shape.rows)
    width = -(-span // pieces)
    padded_width = triton.next_power_of_2(width)
    rows = max(padded_width, SMALLEST_PRODUCT)
    # Rows and columns of a span's pieces: (batch, heads, Q, pieces, J, pieces)
    parts = torch.empty(batch, heads, len(query_spans), pieces, n_spans, pieces, dtype=torch.float32, device=q.device)
    work, first_span, step = _order(query_spans, q.device)
    of_a_span = batch * heads * pieces
    at_once = _spans_at_once(of_a_span, n_spans * pieces * rows)
    scratch = torch.empty(
        min(at_once, len(query_spans)) * of_a_span, n_spans * pieces, rows, dtype=torch.float32, device=q.device
    )
    with torch.cuda.device_of(q):
        for first in range(0, len(query_spans), at_once):
            span_focus_kernel[(min(at_once, len(query_spans) - first) * of_a_span,)](
                q,
                k,
                work,
                parts,
                scratch,
                *q.stride(),
                *k.stride(),
                heads,
                heads // k.shape[1],
                batch * heads,
                length,
                span,
                width,
                len(query_spans),
                first,
                first_span,
                step,
                *_factors(scale, softcap),
                HEAD_DIM=head_dim,
                PADDED_DIM=_padded(head_dim),
                ROWS=rows,
                TILE=shape.tile,
                EDGE=shape.tile // 2,
                PIECES=pieces,
                PADDED_WIDTH=padded_width,
                EVEN=pieces * padded_width == span,
                PROGRESSION=work is None,
                CAUSAL=denominator == "causal",
                SOFTCAP=softcap is not None,
                PRECISION=_precision(q),
                num_warps=shape.warps,
                num_stages=shape.stages,
                **_register_limit(shape),
            )
    return parts.sum((3, 5)) if pieces > 1 else parts[:, :, :, 0, :, 0]


def attend_and_focus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: int,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    denominator: str = "prior",
) -> Tensor:
    """Attention output, into `out`, and the mass between all spans; see `longsift.attention.attention_and_focus`.

    The queries before the first span have no row in the mass, and their output is left to the caller.
    """
    batch, heads, length, head_dim = q.shape
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    n_spans = length // span
    shape = _fused_shape(q)
    focus = torch.empty(batch, heads, n_spans, n_spans, dtype=torch.float32, device=q.device)
    at_once = _spans_at_once(batch * heads, n_spans * span)
    scratch = torch.empty(min(at_once, n_spans) * batch * heads, n_spans, span, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        for first in range(0, n_spans, at_once):
            attend_and_focus_kernel[(min(at_once, n_spans - first) * batch * heads,)](
                q,
                k,
                v,
                out,
                focus,
                scratch,
                *q.stride(),
                *k.stride(),
                *v.stride(),
                *out.stride()[:3],
                heads,
                heads // k.shape[1],
                batch * heads,
                length,
                first,
                *_factors(scale, softcap),
                HEAD_DIM=head_dim,
                PADDED_DIM=_padded(head_dim),
                VALUE_DIM=v.shape[3],
                PADDED_VALUE=_padded(v.shape[3]),
                SPAN=span,
                TILE=shape.tile,
                CAUSAL=denominator == "causal",
                SOFTCAP=softcap is not None,
                PRECISION=_precision(q),
                num_warps=shape.warps,
                num_stages=shape.stages,
                **_register_limit(shape),
            )
    return focus


def _spans_at_once(programs: int, masses: int) -> int:
    """Query spans of a launch, each of so many programs, which keep so many masses each: enough to fill a GPU."""
    return max(SCRATCH_BYTES // (programs * masses * 4), -(-LEAST_PROGRAMS // programs))


def _order(query_spans: Sequence[int], device: torch.device) -> tuple[Tensor | None, int, int]:
    """The query spans such that the longest come first, so that the last program to end has a short one.

    Two or more in a progression are a first span and a step. Others are a tensor of where each program writes and
    which span it measures, (2, Q); its copy to the GPU makes the host wait, and costs as much as a small kernel.
    """
    count = len(query_spans)
    step = query_spans[1] - query_spans[0] if count > 1 else -1
    if step and all(b - a == step for a, b in pairwise(query_spans)):
        return None, query_spans[0], step
    order = sorted(range(count), key=lambda i: -query_spans[i])
    return torch.tensor([order, [query_spans[i] for i in order]], dtype=torch.int32, device=device), 0, 0


class _Shape(NamedTuple):
    """Of a program."""

    rows: int  # queries
    tile: int  # keys taken at once
    warps: int
    stages: int  # tiles of keys in shared memory, the one in use included
    registers: int | None = None  # of a thread at most; fewer let two programs share a multiprocessor


# Measured on an H100 (docs/performance.md). Two programs share a multiprocessor: the tile of one is exponentiated while
# that of the other is multiplied.
def _far_shape(q: Tensor) -> _Shape:
    if q.dtype == torch.float32:
        return _fitting(_Shape(32, 32, 4, 1) if q.shape[3] > 128 else _Shape(64, 64, 4, 1), q)
    if q.shape[3] > 128:
        return _fitting(_Shape(64, 64, 4, 2), q)
    return _fitting(_Shape(128, 64, 8, 5, 128) if q.shape[3] > 64 else _Shape(128, 128, 8, 3, 128), q)


def _focus_shape(q: Tensor) -> _Shape:
    if q.dtype == torch.float32 or q.shape[3] > 128:
        return _far_shape(q)
    return _fitting(_Shape(128, 128, 8, 2 if q.shape[3] > 64 else 3, 128), q)  # a span is not cut


def fuses(q: Tensor, v: Tensor, span: int) -> bool:
    """Whether `attend_and_focus` takes these, and is faster than the output and the mass one after the other."""
    wide = max(q.shape[3], v.shape[3])
    if span != FUSED_SPAN or q.dtype == torch.float32 or wide > 128:
        return False
    return _shared_memory(q.device) >= (FUSED_BYTES if wide <= 64 else FUSED_BYTES_WIDE)


def _fused_shape(q: Tensor) -> _Shape:
    return _Shape(FUSED_SPAN, 128, 8, 2) if q.shape[3] > 64 else _Shape(FUSED_SPAN, 64, 8, 2, 128)


def _fitting(shape: _Shape, q: Tensor) -> _Shape:
    """`shape`, or a smaller one whose queries and tiles of keys fit a processor's shared memory."""
    room = _shared_memory(q.device) - SHARED_BYTES
    row = _padded(q.shape[3]) * q.element_size()
    while (shape.rows + shape.stages * shape.tile) * row > room:
        if shape.stages > 2:
            shape = shape._replace(stages=shape.stages - 1)
        elif shape.tile > SMALLEST_TILE:
            shape = shape._replace(rows=max(shape.rows // 2, SMALLEST_TILE), tile=shape.tile // 2)
        else:
            break
    return shape


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of a processor's shared memory; an H100's in the interpreter."""
    if device.type == "cpu":
        return 227 << 10
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _register_limit(shape: _Shape) -> dict[str, int]:
    """The option for it, which only NVIDIA's compiler has."""
    return {} if shape.registers is None or torch.version.cuda is None else {"maxnreg": shape.registers}


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The factor of a product and the soft cap, such that logits come out times log2(e)."""
    return (scale * math.log2(math.e), 0.0) if softcap is None else (scale / softcap, softcap * math.log2(math.e))


def _padded(head_dim: int) -> int:
    return max(1 << (head_dim - 1).bit_length(), SMALLEST_PRODUCT)


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"  # the latter concerns float32 alone


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy where an offset within a tile would not fit 32 bits; the tile's own is of 64."""
    reach = max(x.stride(2), x.stride(3)) * LARGEST_HEAD_DIM
    return x if reach < 2**31 else x.contiguous()
