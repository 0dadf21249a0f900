"""Reductions of causal attention that never hold the length × length map.

Notation: for one head, `P[n, m]` is the causal attention probability that query token n gives key token m,
the softmax over m ≤ n of `scale · q_n·k_m` (soft-capped when the model does so). Queries have the shape
(batch, heads, length, head_dim), keys (batch, kv_heads, length, head_dim); each key head is shared by
`heads / kv_heads` consecutive query heads and never copied. Each window of a batch is measured alone, so that
its result is the same bits whatever else is in the batch.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from longsift.attention import cpu, reference
from longsift.attention.output import causal_attention

__all__ = [
    "Backend",
    "Denominator",
    "FarStatistics",
    "attention_and_focus",
    "causal_attention",
    "chosen_backend",
    "far_statistics",
    "span_focus",
]

FOCUS_BYTES = 1 << 30  # of the focus of single heads that only their mean is wanted of

Backend = Literal["auto", "cpu", "triton", "reference"]
Denominator = Literal["prior", "causal"]


@dataclass(frozen=True, slots=True)
class FarStatistics:
    """How much every head attends to the far past, and how evenly.

    Attributes:
        strength: LongAttn's dependency strength DS, (batch, heads): mean of the queries' far mass, 0 to 1.
        variance: LongAttn's -DU, (batch, heads): variance of the map whose near part is set to 0.
        mass: Σ P[n, m] over the far keys of each measured query, (batch, heads, rows).
        squares: Σ P[n, m]² over the same, (batch, heads, rows).
    """

    strength: Tensor
    variance: Tensor
    mass: Tensor
    squares: Tensor


def far_statistics(
    q: Tensor,
    k: Tensor,
    distance: int,
    *,
    rows: Tensor | None = None,
    skip: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    backend: Backend = "auto",
) -> FarStatistics:
    """Sum and spread of the attention to keys at least `distance` tokens back.

    `strength = (1/L) Σ P[n, m]` over the far pairs `n - m ≥ distance`; `variance` is the unbiased variance
    over all L×L entries of the map in which every entry that is not a far pair is set to 0 (LongAttn, arXiv
    2502.16860, as in its published code). Perfectly flat attention at `distance = L/4` has strength 0.403 for
    large L.

    Args:
        q: queries after position encoding, (batch, heads, length, head_dim); length ≥ 2. Only those at `rows`,
            (batch, heads, len(rows), head_dim), when that is given.
        k: keys after position encoding, (batch, kv_heads, length, head_dim).
        distance: least query-to-key distance of a far pair, tokens; at `distance ≥ length` no pair is far.
        rows: ascending positions of the queries, (rows,) int64 on their device, when only some are measured. Then
            `strength` and `variance` take the mean of these queries for the mean of all. Positions are not looked
            at, since that would wait for the device: those outside the window give numbers without a meaning.
        skip: keys of the first `skip` tokens, the attention sink, are in no far pair; they stay in the softmax.
        scale: factor of the logits; 1/√head_dim when not given.
        softcap: logits become softcap·tanh(logits/softcap) when given.
        sliding_window: query n sees the keys n - sliding_window + 1 … n (as in transformers) when given, and its
            far keys are those `distance` to `sliding_window - 1` tokens back. The variance stays that of all L×L
            entries, of which those outside the window are 0 like the near ones. At `sliding_window ≤ distance`
            no pair is far.
        backend: "auto" takes the fastest for the device; "cpu" is blockwise PyTorch, for any device;
            "reference" holds the map and computes in the dtype of its inputs; "triton" is kernels for a GPU, which
            "auto" takes where they apply.

    Returns:
        Strength and variance in float64, of mass and squares in float32 (in the input dtype from the reference).
        Inputs that hold NaN give NaN.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit together.
    """
    _check_queries_and_keys(q, k, softcap, rows)
    length = k.shape[2]
    if length < 2:
        raise ValueError(f"a variance needs a window of at least 2 tokens; got length {length}")
    if distance < 0:
        raise ValueError(f"distance counts tokens and cannot be negative; got {distance}")
    if skip < 0:
        raise ValueError(f"skip counts tokens and cannot be negative; got {skip}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token; got {sliding_window}")
    mass, squares = _module(backend, q).far_rows(
        q.detach(),
        k.detach(),
        distance,
        rows=rows,
        skip=skip,
        scale=_scale(q, scale),
        softcap=softcap,
        sliding_window=None if sliding_window is None or sliding_window >= length else sliding_window,
    )
    # A window at a time: how a GPU splits a sum over its processors depends on how many sums there are.
    strength, mean_squares = (torch.stack([window.double().mean(-1) for window in x]) for x in (mass, squares))
    entries = length * length
    variance = (mean_squares * length - strength.square()) / (entries - 1)
    return FarStatistics(strength, variance, mass, squares)


def span_focus(
    q: Tensor,
    k: Tensor,
    span: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    denominator: Denominator = "prior",
    query_spans: Sequence[int] | None = None,
    average_heads: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Attention mass that spans of queries give to spans of keys: what LADM (arXiv 2503.02502) is made of.

    Spans are aligned to the end of the window: there are `J = L // span`, and span j covers the tokens
    `[r + j·span, r + (j+1)·span)` with `r = L % span`. Entry `[j, c]` is the sum, over the rows of query span
    j, of the probability given to the keys of span c. For L = 10, span = 4: J = 2, the spans are tokens 2–5
    and 6–9.

    Args:
        q: queries after position encoding, (batch, heads, length, head_dim).
        k: keys after position encoding, (batch, kv_heads, length, head_dim).
        span: tokens of a span, at most the length.
        scale: factor of the logits; 1/√head_dim when not given.
        softcap: logits become softcap·tanh(logits/softcap) when given.
        denominator: what a row's probabilities are normalised over. "prior": all keys before the query span
            (the r leading ones too), none of its own; entries with c ≥ j are 0. "causal": all keys up to the
            query, so that `[j, j]` is the mass on the own span and entries with c > j are 0.
        query_spans: the indices j to measure, each in [0, J); all J when not given.
        average_heads: return the mean over heads.
        backend: as for `far_statistics`; "triton" is kernels for a GPU, which "auto" takes where they apply.

    Returns:
        (batch, heads, Q, J), or (batch, Q, J) when `average_heads`, with Q = len(query_spans); float32 (the
        input dtype from the reference). Rows whose visible part holds NaN give NaN.

    Raises:
        ValueError: shapes, dtypes, names or indices that do not fit together.
    """
    chosen = _check_spans(q, k, span, softcap, denominator, query_spans)
    q, k = q.detach(), k.detach()
    module, factor = _module(backend, q), _scale(q, scale)

    def measure(of: slice, of_kv: slice) -> Tensor:
        focus: Tensor = module.span_focus(
            q[:, of],
            k[:, of_kv],
            span,
            scale=factor,
            softcap=softcap,
            denominator=denominator,
            query_spans=chosen,
        )
        return focus

    return _focus_of_heads(measure, q, k, len(chosen), average_heads)


def chosen_backend(q: Tensor) -> tuple[Backend, str | None]:
    """The backend that "auto" takes for these queries, and why it is not the kernels where it is not."""
    if not q.is_cuda:
        return "cpu", f"the kernels need a GPU; these are on the {q.device.type}"
    refusal = _kernels_refuse(q)
    return ("triton", None) if refusal is None else ("cpu", f"the backend triton {refusal}")


def attention_and_focus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: int,
    *,
    scale: float,
    softcap: float | None = None,
    denominator: Denominator = "prior",
    query_spans: Sequence[int] | None = None,
    average_heads: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """A layer's causal attention output and the mass between its spans, in one pass where a GPU has a kernel for it.

    Args:
        v: values, (batch, kv_heads, length, value_dim); the others as for `span_focus`, `causal_attention`.

    Returns:
        The output, (batch, heads, length, value_dim) in the dtype of q, and the focus as from `span_focus`.

    Raises:
        ValueError: as those.
    """
    module = _module(backend, q)
    if module in (cpu, reference) or not module.fuses(q, v, span):
        focus = span_focus(
            q,
            k,
            span,
            scale=scale,
            softcap=softcap,
            denominator=denominator,
            query_spans=query_spans,
            average_heads=average_heads,
            backend=backend,
        )
        return causal_attention(q, k, v, scale=scale, softcap=softcap), focus
    chosen = _check_spans(q, k, span, softcap, denominator, query_spans)
    q, k, v = q.detach(), k.detach(), v.detach()
    batch, heads, length, _ = q.shape
    # As the projection after it wants it: the heads of a token side by side
    out = torch.empty(batch, length, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    if lead := length % span:  # queries before the first span
        first = (x[:, :, :lead] for x in (q, k, v))
        out[:, :, :lead] = causal_attention(*first, scale=scale, softcap=softcap)

    def measure(of: slice, of_kv: slice) -> Tensor:
        focus: Tensor = module.attend_and_focus(
            q[:, of], k[:, of_kv], v[:, of_kv], span, out[:, of], scale=scale, softcap=softcap, denominator=denominator
        )
        return focus if chosen == range(length // span) else _rows_of(focus, chosen)

    return out, _focus_of_heads(measure, q, k, length // span, average_heads)


def _module(backend: str, q: Tensor) -> ModuleType:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}; got {backend!r}")
    if backend == "auto":
        backend = chosen_backend(q)[0]
    if backend == "reference":
        return reference
    if backend == "cpu":
        return cpu
    refusal = _kernels_refuse(q)
    if refusal is not None:
        raise ValueError(f'the backend "triton" {refusal}; take "auto" or "cpu"')
    return importlib.import_module("longsift.attention.triton")


def _kernels_refuse(q: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    refusal: str | None = importlib.import_module("longsift.attention.triton").refusal(q)
    return refusal


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


def _check_spans(
    q: Tensor, k: Tensor, span: int, softcap: float | None, denominator: str, query_spans: Sequence[int] | None
) -> Sequence[int]:
    """The query spans to measure, when everything fits together."""
    _check_queries_and_keys(q, k, softcap)
    length = q.shape[2]
    if not 1 <= span <= length:
        raise ValueError(f"span must be between 1 and the window length {length}; got {span}")
    if denominator not in ("prior", "causal"):
        raise ValueError(f'denominator must be "prior" or "causal"; got {denominator!r}')
    n_spans = length // span
    chosen = range(n_spans) if query_spans is None else query_spans
    outside = [j for j in chosen if not 0 <= j < n_spans]
    if outside or not chosen:
        raise ValueError(f"query_spans must name at least one of the spans 0..{n_spans - 1}; got {outside or 'none'}")
    return chosen


def _focus_of_heads(
    measure: Callable[[slice, slice], Tensor], q: Tensor, k: Tensor, query_spans: int, average: bool
) -> Tensor:
    """The focus of all heads, or its mean over them, for which a few at a time are held where they are large."""
    batch, heads = q.shape[:2]
    group, kv_heads = heads // k.shape[1], k.shape[1]
    if not average:
        return measure(slice(heads), slice(kv_heads))
    of_a_kv_head = batch * group * query_spans * query_spans * 4
    step = min(max(FOCUS_BYTES // of_a_kv_head, 1), kv_heads)
    if step == kv_heads:
        return measure(slice(heads), slice(kv_heads)).mean(1)
    parts = (slice(first, min(first + step, kv_heads)) for first in range(0, kv_heads, step))
    total = sum(measure(slice(of.start * group, of.stop * group), of).sum(1) for of in parts)
    assert isinstance(total, Tensor)
    return total / heads


def _rows_of(focus: Tensor, spans: Sequence[int]) -> Tensor:
    """The rows of `spans` of (batch, heads, J, J); no copy to the device where they are a falling progression."""
    step = spans[0] - spans[1] if len(spans) > 1 else 1
    if step > 0 and all(a - b == step for a, b in pairwise(spans)):
        return focus[:, :, spans[-1] : spans[0] + 1 : step].flip(2)
    return focus[:, :, list(spans)]


def _check_queries_and_keys(q: Tensor, k: Tensor, softcap: float | None, rows: Tensor | None = None) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "q must be (batch, heads, length, head_dim) and k (batch, kv_heads, length, head_dim); "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if rows is not None and (rows.shape != q.shape[2:3] or rows.dtype != torch.int64 or rows.device != q.device):
        raise ValueError(
            "rows must be the positions of the queries, (rows,) int64 on their device; "
            f"got {tuple(rows.shape)} {rows.dtype} on {rows.device} for q {tuple(q.shape)} on {q.device}"
        )
    same_length = rows is not None or q.shape[2] == k.shape[2]
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or not same_length or 0 in q.shape:
        raise ValueError(
            "q and k must agree in batch, length and head_dim, none of them 0; "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"the query heads ({q.shape[1]}) must be a multiple of the key heads ({k.shape[1]}), and not 0"
        )
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q and k must share one floating-point dtype; got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"q and k must be on one device; got {q.device} and {k.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive; got {softcap}")
